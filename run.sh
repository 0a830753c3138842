#!/bin/sh
# units (persistent) beside today's kernels and cuDNN: correctness against f64, then TFLOP/s. Takes about 45 s.
cd "$(dirname "$0")"; export PYTHONUNBUFFERED=1 UNTIL=50 PARTS=1024; timeout 60 python3 fb.py o.cubin,u1.cubin 128,64 512,1024,2048,4096,16384 2 | tee ${OUT:-.}/bw.txt

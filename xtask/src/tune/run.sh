#!/usr/bin/env bash
# Checks and measures the variants of flash3's forward kernel in this folder, on a Hopper GPU, and prints the rows of the
# kernel's table to adopt. It says `skipped` where there is no such GPU. `run.sh --help`: what it can be told.
cd "$(dirname "$0")" || exit 1
exec ./ferroflash tune . "$@"

//! The command `ferroflash`, from end to end: what it prints and writes for good input, and how it refuses bad input.
//!
//! `FERROFLASH_BIN` and `FERROFLASH_EXAMPLES` say where the command and the example inputs are when the tests run elsewhere
//! than they were built.
use safetensors::tensor::TensorView;
use safetensors::{Dtype, SafeTensors};
use serde_json::Value;
use std::ffi::OsStr;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

/// Runs the command.
fn ferroflash<A: AsRef<OsStr>>(arguments: impl IntoIterator<Item = A>) -> Output {
    let binary = std::env::var_os("FERROFLASH_BIN").unwrap_or_else(|| env!("CARGO_BIN_EXE_ferroflash").into());
    Command::new(binary).args(arguments).output().expect("the command starts")
}

/// Runs the command, which must succeed, and returns what it prints.
fn succeeds<A: AsRef<OsStr>>(arguments: impl IntoIterator<Item = A>) -> String {
    let output = ferroflash(arguments);
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{}{stderr}", String::from_utf8_lossy(&output.stdout));
    assert_eq!(stderr, "", "nothing on stderr that is no terminal");
    String::from_utf8(output.stdout).expect("UTF-8")
}

/// Runs the command, which must succeed with `--json`, and returns the object that it prints.
fn answers<A: AsRef<OsStr>>(arguments: impl IntoIterator<Item = A>) -> Value {
    let arguments = arguments.into_iter().map(|argument| argument.as_ref().to_owned());
    let printed = succeeds(arguments.chain(["--json".into()]));
    serde_json::from_str(&printed).unwrap_or_else(|error| panic!("{error} in {printed}"))
}

/// Runs the command, which must fail with exit code `code` and print to stderr alone, and returns what it says there.
fn fails<A: AsRef<OsStr>>(code: i32, arguments: impl IntoIterator<Item = A>) -> String {
    let output = ferroflash(arguments);
    let stderr = String::from_utf8(output.stderr).expect("UTF-8");
    assert_eq!(output.status.code(), Some(code), "{stderr}");
    assert!(!stderr.contains("panicked"), "{stderr}");
    assert_eq!(String::from_utf8_lossy(&output.stdout), "", "an error goes to stderr");
    stderr
}

/// Runs the command, which must refuse its input with one line that contains `reason`.
#[track_caller]
fn refuses<A: AsRef<OsStr>>(arguments: impl IntoIterator<Item = A>, reason: &str) {
    let message = fails(1, arguments);
    assert!(message.starts_with("error: "), "{message}");
    assert_eq!(message.lines().count(), 1, "{message}");
    assert!(message.contains(reason), "{message:?} does not say {reason:?}");
}

/// A directory for the files of one test, that goes with it.
struct Directory(PathBuf);

impl Directory {
    fn new(test: &str) -> Self {
        let path = std::env::temp_dir().join(format!("ferroflash-{}-{test}", std::process::id()));
        fs::create_dir_all(&path).expect("a directory for temporary files");
        Directory(path)
    }

    fn path(&self, name: &str) -> String {
        self.0.join(name).into_os_string().into_string().expect("UTF-8")
    }

    /// Writes a safetensors file of tensors whose elements vary a little.
    fn tensors(&self, name: &str, tensors: &[(&str, Dtype, &[usize])]) -> String {
        let data: Vec<Vec<u8>> = tensors.iter().map(|&(_, dtype, shape)| elements(dtype, shape)).collect();
        let views = tensors.iter().zip(&data).map(|(&(name, dtype, shape), data)| {
            (name, TensorView::new(dtype, shape.to_vec(), data).expect("as many bytes as the shape says"))
        });
        let path = self.path(name);
        fs::write(&path, safetensors::serialize(views, None).expect("serialised")).expect("written");
        path
    }

    /// Writes q of `q` and k and v of the shape `k`.
    fn attention(&self, name: &str, dtype: Dtype, q: &[usize], k: &[usize]) -> String {
        self.tensors(name, &[("q", dtype, q), ("k", dtype, k), ("v", dtype, k)])
    }

    /// The names of all files in it.
    fn files(&self) -> Vec<String> {
        let entries = fs::read_dir(&self.0).expect("it is there").map(|entry| entry.expect("readable").file_name());
        let mut names: Vec<_> = entries.map(|name| name.into_string().expect("UTF-8")).collect();
        names.sort();
        names
    }
}

impl Drop for Directory {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// Numbers between -2 and 2, as bytes.
fn elements(dtype: Dtype, shape: &[usize]) -> Vec<u8> {
    let numbers = (0..shape.iter().product::<usize>()).map(|i| ((i * 7919 + 13) % 1009) as f32 / 252.25 - 2.0);
    match dtype {
        Dtype::F32 => numbers.flat_map(f32::to_le_bytes).collect(),
        Dtype::F16 => numbers.flat_map(|x| half::f16::from_f32(x).to_le_bytes()).collect(),
        Dtype::BF16 => numbers.flat_map(|x| half::bf16::from_f32(x).to_le_bytes()).collect(),
        Dtype::I64 => numbers.flat_map(|x| (x as i64).to_le_bytes()).collect(),
        Dtype::BOOL => numbers.map(|x| u8::from(x > -1.0)).collect(),
        other => panic!("{other:?} is not for these tests"),
    }
}

fn minilm() -> PathBuf {
    let examples = std::env::var_os("FERROFLASH_EXAMPLES");
    let examples = examples.unwrap_or_else(|| concat!(env!("CARGO_MANIFEST_DIR"), "/examples").into());
    Path::new(&examples).join("minilm_attention.safetensors")
}

fn has_gpu() -> bool {
    let info = answers(["info"]);
    let backends = info["backends"].as_array().expect("a list");
    backends.iter().any(|backend| backend["name"] == "cuda" && backend["available"] == true)
}

#[test]
fn run_computes_real_attention_on_the_cpu() {
    let input = minilm();
    let printed = succeeds([OsStr::new("run"), input.as_os_str(), "--backend=cpu".as_ref(), "--verify".as_ref()]);
    for expected in
        ["backend", "cpu", "batch 1, seqlen_q 512, seqlen_k 512, nheads 12", "TFLOP/s", "extra memory", "passed"]
    {
        assert!(printed.contains(expected), "{expected:?} is not in {printed}");
    }
}

#[test]
fn run_computes_real_attention_on_the_simulator() {
    let arguments = ["--backend=simulator", "--kernel=flash2", "--verify"].map(OsStr::new);
    let answer = answers([OsStr::new("run"), minilm().as_os_str()].into_iter().chain(arguments));
    assert_eq!(answer["kernel"], "flash2");
    assert_eq!(answer["accuracy"]["passed"], true);
}

#[test]
fn run_writes_out_and_softmax_lse() {
    let directory = Directory::new("writes");
    let input = directory.attention("in.safetensors", Dtype::BF16, &[2, 19, 4, 32], &[2, 23, 2, 32]);
    let output = directory.path("out.safetensors");
    let answer =
        answers(["run", &input, "-o", &output, "--backend=cpu", "--causal", "--softmax-scale=0.5", "--verify"]);
    assert_eq!(answer["output"], output.as_str());
    assert_eq!(answer["accuracy"]["passed"], true);

    let bytes = fs::read(&output).expect("written");
    let file = SafeTensors::deserialize(&bytes).expect("safetensors");
    let (out, lse) = (file.tensor("out").expect("out"), file.tensor("softmax_lse").expect("softmax_lse"));
    assert_eq!((out.dtype(), out.shape()), (Dtype::BF16, &[2, 19, 4, 32][..]));
    assert_eq!((lse.dtype(), lse.shape()), (Dtype::F32, &[2, 4, 19][..]));
    assert_eq!(directory.files(), ["in.safetensors", "out.safetensors"], "no draft stays");
}

#[test]
fn run_backward_writes_gradients() {
    let directory = Directory::new("backward");
    let (of_queries, of_keys) = (&[2, 19, 4, 32][..], &[2, 23, 2, 32][..]);
    let tensors = [("q", of_queries), ("k", of_keys), ("v", of_keys), ("dout", of_queries)];
    let input = directory.tensors("in.safetensors", &tensors.map(|(name, shape)| (name, Dtype::F16, shape)));
    let output = directory.path("out.safetensors");
    for backend in ["cpu", "simulator"] {
        let arguments = ["run", &input, "-o", &output, "--backward", "--causal", "--verify", "--backend", backend];
        let answer = answers(arguments);
        assert_eq!(answer["backward"]["accuracy"]["passed"], true);
        assert_eq!(answer["backward"]["flops"].as_u64(), answer["flops"].as_u64().map(|flops| flops * 5 / 2));
        let bytes = fs::read(&output).expect("written");
        let file = SafeTensors::deserialize(&bytes).expect("safetensors");
        let written = [("out", of_queries), ("dq", of_queries), ("dk", of_keys), ("dv", of_keys)];
        for (name, shape) in written {
            let tensor = file.tensor(name).expect(name);
            assert_eq!((tensor.dtype(), tensor.shape()), (Dtype::F16, shape), "{name}");
        }
        file.tensor("softmax_lse").expect("softmax_lse");
        let printed = succeeds(arguments);
        for line in ["time", "backward", "gradients"] {
            assert!(printed.lines().any(|printed| printed.starts_with(line)), "no line {line} in {printed}");
        }
    }
}

#[test]
fn run_backward_needs_dout() {
    let directory = Directory::new("no-dout");
    let input = directory.attention("in.safetensors", Dtype::BF16, &[1, 8, 2, 32], &[1, 8, 2, 32]);
    let needed = "--backward needs dout, bf16 of shape [1, 8, 2, 32], like out";
    refuses(["run", &input, "--backward"], needed);
    refuses(["run", &input, "--backward"], "has no tensor dout; it has: k, q, v");
    let shape = &[1, 8, 2, 32][..];
    let tensors = [("q", shape), ("k", shape), ("v", shape), ("dout", &[1, 7, 2, 32])];
    let input = directory.tensors("short.safetensors", &tensors.map(|(name, shape)| (name, Dtype::F32, shape)));
    refuses(["run", &input, "--backward", "--backend=cpu"], "dout: seqlen is 7; allowed: 8, as of q");
}

/// Writes q, k, v, dout and everything else that attention takes, of two sequences of 19 queries and 23 keys.
fn everything(directory: &Directory, dtype: Dtype) -> String {
    let (of_queries, of_keys) = (&[2, 19, 4, 32][..], &[2, 23, 2, 32][..]);
    let tensors = [
        ("q", dtype, of_queries),
        ("k", dtype, of_keys),
        ("v", dtype, of_keys),
        ("dout", dtype, of_queries),
        ("dlse", Dtype::F32, &[2, 4, 19]),
        ("bias", dtype, &[1, 4, 19, 23]),
        ("mask", Dtype::BOOL, &[2, 1, 1, 23]),
        ("alibi_slopes", Dtype::F32, &[2, 4]),
        ("sinks", Dtype::F32, &[4]),
    ];
    directory.tensors("everything.safetensors", &tensors)
}

#[test]
fn run_takes_all_tensors_and_options() {
    let directory = Directory::new("everything");
    let input = everything(&directory, Dtype::F32);
    let output = directory.path("out.safetensors");
    let options = ["--window=20,all", "--softcap=3", "--dropout=0.2", "--seed=7", "--offset=1", "--deterministic"];
    let tensors = ["--bias", "--mask", "--alibi=file", "--sinks", "--dlse"];
    let always = ["run", &input, "-o", &output, "--backend=cpu", "--backward"];
    let answer = answers(always.into_iter().chain(["--verify"]).chain(options).chain(tensors));
    assert_eq!(answer["accuracy"]["passed"], true, "{answer}");
    let problem = answer["problem"].as_str().expect("in words");
    for word in ["window 20 left", "softcap 3", "dropout 0.2", "bias", "mask", "ALiBi", "sinks"] {
        assert!(problem.contains(word), "{word:?} is not in {problem}");
    }
    let bytes = fs::read(&output).expect("written");
    let file = SafeTensors::deserialize(&bytes).expect("safetensors");
    let shape = |name| file.tensor(name).expect(name).shape().to_vec();
    assert_eq!((shape("dbias"), shape("dsinks")), (vec![1, 4, 19, 23], vec![4]));
    assert_eq!((shape("dq"), shape("dv")), (vec![2, 19, 4, 32], vec![2, 23, 2, 32]));
    // The reference takes the same options: what both ignored would be missed by nobody.
    let all = file.tensor("dq").expect("dq").data().to_vec();
    for left_out in options.into_iter().chain(tensors).filter(|&option| option != "--deterministic") {
        let others = options.into_iter().chain(tensors).filter(|&option| option != left_out);
        // Without dropout its numbers have no use.
        let others = others.filter(|&option| {
            left_out != "--dropout=0.2" || !option.starts_with("--seed") && !option.starts_with("--offset")
        });
        answers(always.into_iter().chain(others));
        let bytes = fs::read(&output).expect("written");
        let file = SafeTensors::deserialize(&bytes).expect("safetensors");
        assert!(file.tensor("dq").expect("dq").data() != all, "{left_out} makes no difference");
    }
}

#[test]
fn run_uses_a_tensor_only_where_its_flag_says_so() {
    let directory = Directory::new("flags");
    let input = everything(&directory, Dtype::F16);
    let answer = answers(["run", &input, "--backend=simulator", "--verify"]);
    assert_eq!(answer["accuracy"]["passed"], true);
    assert_eq!(answer["problem"], "batch 2, seqlen_q 19, seqlen_k 23, nheads 4, nheads_k 2, headdim 32");
    let plain = directory.attention("plain.safetensors", Dtype::F16, &[1, 8, 2, 32], &[1, 8, 2, 32]);
    for (flag, name) in [
        ("--bias", "bias"),
        ("--mask", "mask"),
        ("--sinks", "sinks"),
        ("--alibi=file", "alibi_slopes"),
        ("--varlen", "cu_seqlens_q"),
    ] {
        refuses(["run", &plain, flag], &format!("has no tensor {name}; it has: k, q, v"));
    }
}

#[test]
fn run_says_what_each_kernel_does_not_know() {
    let directory = Directory::new("unknown");
    let input = everything(&directory, Dtype::F16);
    for kernel in ["standard", "flash1"] {
        let arguments = ["run", &input, "--backend=simulator", "--kernel", kernel, "--window=3,3", "--sinks", "--bias"];
        let asked = "window_size (3, 3), bias [1, 4, 19, 23], sinks";
        let allowed = "no window_size, or causal, no bias, no sinks";
        let reason = format!("{kernel}: no kernel of f16 and headdim 32 for {asked}; allowed: {allowed}");
        refuses(arguments, &reason);
    }
}

#[test]
fn run_takes_sequences_of_different_lengths() {
    let directory = Directory::new("varlen");
    let tokens = elements(Dtype::F16, &[40, 2, 32]);
    let starts: Vec<u8> = [0i32, 15, 15, 40].into_iter().flat_map(i32::to_le_bytes).collect();
    let tokens = TensorView::new(Dtype::F16, vec![40, 2, 32], &tokens).expect("as many");
    let starts = TensorView::new(Dtype::I32, vec![4], &starts).expect("four");
    let views = ["q", "k", "v"].map(|name| (name, tokens.clone())).into_iter();
    let views = views.chain(["cu_seqlens_q", "cu_seqlens_k"].map(|name| (name, starts.clone())));
    let input = directory.path("in.safetensors");
    fs::write(&input, safetensors::serialize(views, None).expect("serialised")).expect("written");
    let output = directory.path("out.safetensors");
    let answer = answers(["run", &input, "-o", &output, "--backend=simulator", "--varlen", "--causal"]);
    let problem = "batch 3, seqlen_q 25, seqlen_k 25, nheads 2, nheads_k 2, headdim 32, total_q 40, total_k 40, causal";
    assert_eq!(answer["problem"], problem);
    let bytes = fs::read(&output).expect("written");
    let file = SafeTensors::deserialize(&bytes).expect("safetensors");
    assert_eq!(file.tensor("out").expect("out").shape(), [40, 2, 32]);
    assert_eq!(file.tensor("softmax_lse").expect("LSE").shape(), [2, 40]);
    refuses(["run", &input, "--backend=cpu"], "q: 3 dimensions; allowed: 4");
}

#[test]
fn run_has_each_kernel_on_the_simulator() {
    let directory = Directory::new("kernels");
    let input = directory.attention("in.safetensors", Dtype::F16, &[1, 70, 2, 32], &[1, 70, 2, 32]);
    for kernel in ["standard", "flash1", "flash2", "flash3"] {
        for causal in [None, Some("--causal")] {
            let arguments = ["run", &input, "--backend=simulator", "--kernel", kernel, "--verify"];
            let answer = answers(arguments.into_iter().chain(causal));
            assert_eq!(answer["backend"], "simulator");
            assert_eq!(answer["kernel"], kernel);
            assert_eq!(answer["accuracy"]["passed"], true);
            assert!(answer["hbm"]["loaded"].as_u64() > Some(0));
        }
    }
    let printed = succeeds(["run", &input, "--backend=simulator", "--kernel=flash1"]);
    assert!(printed.contains("HBM") && printed.contains("flash1"), "{printed}");
}

#[test]
fn run_repeats() {
    let directory = Directory::new("repeats");
    let input = directory.attention("in.safetensors", Dtype::F32, &[1, 8, 1, 32], &[1, 8, 1, 32]);
    let printed = succeeds(["run", &input, "--backend=cpu", "--repetitions=3"]);
    assert!(printed.contains("the median of 3"), "{printed}");
}

#[test]
fn run_on_a_gpu() {
    let directory = Directory::new("gpu");
    let input = directory.attention("in.safetensors", Dtype::F16, &[1, 70, 2, 64], &[1, 70, 2, 64]);
    if !has_gpu() {
        refuses(["run", &input, "--backend=cuda"], "CUDA");
        return;
    }
    for kernel in ["standard", "flash1", "flash2"] {
        let answer = answers(["run", &input, "--backend=cuda", "--kernel", kernel, "--verify"]);
        assert_eq!((&answer["backend"], &answer["kernel"]), (&"cuda".into(), &kernel.into()));
        assert_eq!(answer["accuracy"]["passed"], true);
    }
}

#[test]
fn softmax_has_two_methods() {
    let directory = Directory::new("softmax");
    let input = directory.tensors("in.safetensors", &[("x", Dtype::F32, &[2, 3, 100])]);
    let output = directory.path("out.safetensors");
    for backend in ["cpu", "simulator"] {
        for method in ["two-pass", "online"] {
            let answer =
                answers(["softmax", &input, "-o", &output, "--method", method, "--backend", backend, "--verify"]);
            assert_eq!(answer["backend"], backend);
            assert_eq!(answer["accuracy"]["passed"], true);
            let bytes = fs::read(&output).expect("written");
            let y = SafeTensors::deserialize(&bytes).expect("safetensors").tensor("y").expect("y").data().to_vec();
            for row in y.chunks_exact(400) {
                let sum: f32 = row.chunks_exact(4).map(|x| f32::from_le_bytes(x.try_into().expect("four"))).sum();
                assert!((sum - 1.0).abs() < 1e-5, "a row of probabilities sums to {sum}");
            }
        }
    }
    assert!(succeeds(["softmax", &input, "--verify"]).contains("passed"));
}

#[test]
fn info_says_what_would_run() {
    let answer = answers(["info"]);
    let names: Vec<_> = answer["backends"].as_array().expect("a list").iter().map(|backend| &backend["name"]).collect();
    assert_eq!(names, ["cuda", "cpu", "simulator"]);
    assert_eq!(answer["auto"]["backend"], if has_gpu() { "cuda" } else { "cpu" });
    let printed = succeeds(["info"]);
    for line in ["driver", "kernels", "backend", "auto"] {
        assert!(printed.lines().any(|printed| printed.starts_with(line)), "no line {line} in {printed}");
    }
}

#[test]
fn info_lists_what_runs_where() {
    let printed = succeeds(["info", "--kernels"]);
    assert!(printed.starts_with("# What runs where") && printed.contains("| flash2 | forward |"), "{printed}");
    let answer = answers(["info", "--kernels"]);
    let combinations = answer["combinations"].as_array().expect("a list");
    let elder = combinations.iter().find(|combination| combination["algorithm"] == "flash1").expect("there is one");
    assert_eq!((&elder["headdims"], &elder["features"]["softcap"]), (&"32, 64, 128".into(), &"no".into()));
}

#[test]
fn selftest_passes() {
    for backend in ["cpu", "simulator"] {
        let answer = answers(["selftest", "--quick", "--backend", backend]);
        assert!(answer["passed"].as_u64() > Some(10));
        assert_eq!(answer["failed"], 0);
    }
    assert!(succeeds(["selftest", "--quick", "--backend=cpu"]).contains(" passed, 0 failed"));
    let answer = answers(["selftest", "--quick", "--backend=simulator", "--kernel=flash1"]);
    let groups = answer["groups"].as_array().expect("a list");
    assert!(groups.iter().all(|group| group["name"].as_str().is_some_and(|name| name.starts_with("flash1 "))));
    assert_eq!(answer["failed"], 0);
    let reason = "--kernel: flash2; allowed on the cpu backend: auto";
    refuses(["selftest", "--quick", "--backend=cpu", "--kernel=flash2"], reason);
    let too_little = fails(2, ["selftest", "--shared-memory=98"]);
    assert!(too_little.contains("'--shared-memory <KIB>': 98 is not in 99..=1024"), "{too_little}");
}

#[test]
fn explain_counts_what_the_formulas_say() {
    let answer = answers(["explain", "--seqlen=100", "--headdim=32", "--seqlens=128,64,100"]);
    let growth = answer["growth"].as_array().expect("a list");
    assert_eq!(growth.len(), 9, "three kernels at three lengths");
    for run in growth {
        assert_eq!(run["bytes"], run["formula_bytes"], "{run}");
    }
    let algorithms = answer["algorithms"].as_array().expect("a list");
    let bytes: Vec<_> = algorithms.iter().map(|algorithm| algorithm["bytes"].as_u64().expect("a number")).collect();
    assert!(bytes[0] > bytes[1] && bytes[1] > bytes[2], "standard > flash1 > flash2: {bytes:?}");
    assert_eq!(algorithms[0]["steps"].as_array().map(Vec::len), Some(3));
}

#[test]
fn explain_draws() {
    let directory = Directory::new("explain");
    let picture = directory.path("flash.svg");
    let printed = succeeds(["explain", "--seqlen=64", "--seqlens=64,128", "--svg", &picture]);
    for expected in ["standard", "flash1", "flash2", "softmax(S)", "LSE", "Θ(N² d² / M)", &picture] {
        assert!(printed.contains(expected), "{expected:?} is not in {printed}");
    }
    let svg = fs::read_to_string(&picture).expect("written");
    assert!(svg.starts_with("<svg ") && svg.ends_with("</svg>\n"));
    for word in ["NaN", "inf"] {
        assert!(!svg.contains(word), "a coordinate is {word}");
    }
    assert_eq!(directory.files(), ["flash.svg"]);
}

#[test]
fn bench_measures_each_kernel_on_the_simulator() {
    let answer =
        answers(["bench", "--backend=simulator", "--seqlens=17,32", "--tokens=34", "--headdim=32", "--nheads=2"]);
    assert_eq!((&answer["backend"], &answer["repetitions"]), (&"simulator".into(), &1.into()));
    let rows = answer["rows"].as_array().expect("a list");
    let names: Vec<_> =
        rows.iter().map(|row| (row["seqlen"].as_u64(), row["batch"].as_u64(), &row["kernel"])).collect();
    let expected = [(17, 2), (32, 1)].map(|(seqlen, batch)| {
        ["standard", "flash1", "flash2", "flash3"].map(|kernel| (Some(seqlen), Some(batch), Value::from(kernel)))
    });
    assert!(
        names.iter().copied().eq(expected.as_flattened().iter().map(|(s, b, kernel)| (*s, *b, kernel))),
        "{names:?}"
    );
    for row in rows {
        assert!(row["seconds"].as_f64() > Some(0.0) && row["tflops"].as_f64() > Some(0.0), "{row}");
    }
    let of_inputs: Vec<_> = rows.iter().map(|row| row["extra_per_input"].as_f64().expect("a number")).collect();
    // Its LSE: 4 bytes for each row of 32 elements of 2 bytes, which Q, K and V have.
    assert!((of_inputs[2] - 4.0 / (3.0 * 32.0 * 2.0)).abs() < 1e-9, "{of_inputs:?}");
    assert!(of_inputs[0] > of_inputs[2], "S and P are more than the LSE");
}

#[test]
fn bench_measures_the_cpu() {
    let arguments =
        ["bench", "--backend=cpu", "--seqlens=8,16", "--batch=1", "--nheads=1", "--repetitions=2", "--causal"];
    let answer = answers(arguments);
    let rows = answer["rows"].as_array().expect("a list");
    // One algorithm; its FLOPs are 4 seqlen² headdim, and half of it when causal.
    assert_eq!(rows.iter().map(|row| row["flops"].as_u64()).collect::<Vec<_>>(), [Some(8192), Some(32768)]);
    let printed = succeeds(arguments);
    for expected in ["seqlen", "TFLOP/s", "extra memory", "the median of 2", "bf16, causal", "tiled online softmax"] {
        assert!(printed.contains(expected), "{expected:?} is not in {printed}");
    }
}

#[test]
fn bench_measures_gradients() {
    for (backend, kernels) in [("cpu", 1), ("simulator", 2)] {
        let small = ["bench", "--backward", "--backend", backend, "--seqlens=16", "--batch=1", "--nheads=1"];
        let answer = answers(small);
        let rows = answer["rows"].as_array().expect("a list");
        assert_eq!((&answer["pass"], rows.len()), (&"backward".into(), kernels));
        assert_eq!(rows[0]["flops"].as_u64(), Some(10 * 16 * 16 * 64));
        assert!(rows[0]["seconds"].as_f64() > Some(0.0), "{answer}");
    }
}

#[test]
fn bench_says_what_a_kernel_cannot_do_and_goes_on() {
    let small = ["bench", "--backend=simulator", "--seqlens=16", "--batch=1", "--nheads=1"];
    let answer = answers(small.into_iter().chain(["--kernels=standard,flash2", "--headdim=48"]));
    let error = answer["rows"][0]["error"].as_str().expect("standard has no 48");
    assert!(error.contains("standard: headdim 48; allowed: 32, 64, 128"), "{error}");
    assert!(answer["rows"][1]["seconds"].as_f64() > Some(0.0));

    let output = ferroflash(small.into_iter().chain(["--headdim=48", "--kernels=standard,flash1"]));
    assert_eq!(output.status.code(), Some(1), "nothing was measured");
    let printed = String::from_utf8(output.stdout).expect("UTF-8");
    assert!(printed.contains("flash1: headdim 48; allowed: 32, 64, 128"), "{printed}");
    refuses(["bench", "--backend=cpu", "--batch=2000000000", "--nheads=2000000000"], "elements; allowed: at most");
}

#[test]
fn ptx_prints_what_is_embedded() {
    let names = succeeds(["ptx"]);
    let kernels = answers(["ptx"]);
    let kernels = kernels["kernels"].as_array().expect("a list");
    assert!(names.lines().eq(kernels.iter().map(|kernel| kernel["name"].as_str().expect("a name"))));
    assert_eq!(Some(kernels), answers(["info"])["kernels"].as_array());
    assert!(succeeds(["ptx", "--arch=sm_10"]).is_empty());

    let name = "flash2_fwd_bf16_d64_causal";
    let ptx = succeeds(["ptx", name]);
    assert!(ptx.contains(".target sm_80") && ptx.contains(&format!(".visible .entry {name}(")), "{ptx}");
    let kernel = answers(["ptx", name]);
    assert_eq!(kernel["ptx"], ptx.as_str());
    assert_eq!((&kernel["family"], &kernel["dtype"]), (&"flash2".into(), &"bf16".into()));
    assert_eq!((&kernel["headdim"], &kernel["causal"]), (&64.into(), &true.into()));
    for size in ["threads", "shared_bytes", "block_m", "block_n"] {
        assert!(kernel[size].as_u64() > Some(0), "{size}");
    }

    let directory = Directory::new("ptx");
    let file = directory.path("flash2.ptx");
    assert_eq!(succeeds(["ptx", name, "-o", &file]), "");
    assert_eq!(fs::read_to_string(&file).expect("written"), ptx);
    refuses(["ptx", "flash9_fwd"], "no kernel \"flash9_fwd\" is embedded here");
}

/// Whole heads where sequences are short and there are enough of them, beyond that blocks of keys of heads that take turns at
/// sums, and where sequences are so long that these would leave the cache, of heads that have sums of their own.
#[test]
fn info_explains_which_keys_a_block_of_threads_takes_backward() {
    if succeeds(["ptx", "--arch=sm_90a"]).is_empty() {
        return println!("skipped: this build embeds no PTX for sm_90a");
    }
    let pass = |seqlen: usize| {
        let sizes = [format!("--batch={}", 16384_usize.div_ceil(seqlen)), format!("--seqlen={seqlen}")];
        let of = ["info", "--explain-dispatch", "--arch=sm_90", "--causal", "--headdim=64", "--nheads=32"];
        let explained = answers(of.map(String::from).into_iter().chain(sizes));
        explained["backward"]["launches"][1]["entry"].as_str().expect("a name").to_owned()
    };
    assert_eq!(pass(512), "flash3_bwd_heads_bf16_d64_m128_causal");
    assert_eq!(pass(1024), "flash3_bwd_ring_bf16_d64_m128_causal");
    assert_eq!(pass(16384), "flash3_bwd_ring_bf16_d64_m128_causal");
    assert_eq!(pass(65536), "flash3_bwd_bf16_d64_m128_causal");
}

#[test]
fn info_explains_which_kernels_would_run() {
    let explained = |arguments: &[&str]| {
        let all = ["info", "--explain-dispatch", "--seqlen=512", "--headdim=128"];
        let printed = succeeds(all.iter().chain(arguments));
        // The sizes of tiles are the kernels' affair.
        let without_sizes = |line: &str| {
            let name = line.split_once(": tiles of ").or_else(|| line.split_once(": blocks of "));
            name.map_or(line, |(name, _)| name).to_owned()
        };
        printed.lines().map(without_sizes).collect::<Vec<_>>()
    };
    let sizes = "bf16, batch 1, seqlen_q 512, seqlen_k 512, nheads 16, nheads_k 16, headdim 128";
    let expected = [
        &format!("problem       {sizes}, causal"),
        "architecture  sm_80, 163 KiB of shared memory a block",
        "forward       flash2: flash2 is the newest kernel that can: flash3: runs on sm_90, not on sm_80",
        "              flash2_fwd_bf16_d128_causal",
        "backward      flash2: flash2 is the newest kernel that can: flash3: runs on sm_90, not on sm_80; fused: dQ is \
         summed by atomic additions, unless deterministic forbids it",
        "              flash2_bwd_fused_prepare_bf16_d128",
        "              flash2_bwd_fused_bf16_d128_m64_causal",
        "              flash2_bwd_fused_finish_bf16_d128_m64",
        "              4.06 MiB of workspace",
    ];
    assert_eq!(explained(&["--arch=sm_80", "--causal"]), expected);

    // Until PTX for Hopper has been built, Hopper runs what other GPUs do, and is told why.
    let is_built = !succeeds(["ptx", "--arch=sm_90a"]).is_empty();
    let (plain, dropped) = match is_built {
        true => (
            "flash3: flash3 is the newest kernel",
            "no kernel of bf16 and headdim 128 for dropout_p 0.1; allowed: dropout_p 0",
        ),
        false => (
            "flash2: flash2 is the newest kernel that can: flash3: this build embeds no PTX for sm_90a",
            "this build embeds no PTX for sm_90a",
        ),
    };
    assert_eq!(explained(&["--arch=sm_90"])[2], format!("forward       {plain}"));
    // A step of decoding.
    let packed = "; 4 heads that share K and V are packed into tiles, 4 of them instead of 16";
    let packed = format!("forward       {plain}{}", if is_built { packed } else { "" });
    let step = ["info", "--explain-dispatch", "--arch=sm_90", "--seqlen=1", "--seqlen-k=512", "--nheads-k=4"];
    assert_eq!(succeeds(step).lines().nth(2), Some(&*packed));
    let capped = succeeds([&step[..], &["--softcap=30", "--window=300,0"]].concat());
    assert_eq!(capped.lines().nth(2), Some(&*packed));
    assert_eq!(explained(&["--arch=sm_90", "--softcap=30"])[2], format!("forward       {plain}"));
    let expected = format!("forward       flash2: flash2 is the newest kernel that can: flash3: {dropped}");
    assert_eq!(explained(&["--arch=sm_90", "--softcap=30", "--dropout=0.1"])[2], expected);

    // What flash3's backward pass cannot do is left to flash2 too.
    let backward = |arguments: &[&str]| {
        let lines = explained(&[&["--arch=sm_90"][..], arguments].concat());
        lines.into_iter().find_map(|line| line.strip_prefix("backward      ").map(str::to_owned)).expect("a line")
    };
    let fused = "fused: dQ is summed by atomic additions, unless deterministic forbids it";
    let owned = "each gradient is computed where it is owned";
    let capped = "flash3: this build embeds no PTX for sm_90a";
    let left = |reason| format!("flash2: flash2 is the newest kernel that can: {reason}");
    let ordered = match is_built {
        true => format!(
            "{plain}; fused: dQ is summed in the order of the keys, the same in every run; deterministic asks for it"
        ),
        false => format!("{}; {owned}: deterministic asks for it", left(capped)),
    };
    // 16 heads of 512 tokens are few for a GPU of Hopper's.
    let shared = if is_built { "; 2 blocks of threads share the queries of each of 64 blocks of keys" } else { "" };
    assert_eq!(backward(&[]), format!("{plain}; {fused}{shared}"));
    let unfused = "flash2 backward, fused: no kernel of bf16 and headdim 128 for softcap 30; allowed: no softcap";
    let general = if is_built { format!("{plain}; {fused}") } else { format!("{}; {owned}: {unfused}", left(capped)) };
    assert_eq!(backward(&["--softcap=30"]), general);
    // How much the smallest of its kernels needs is their affair.
    let tight = format!("{owned}: flash2 backward, fused: ");
    let said = |line: &String| {
        line.contains(&tight) && line.ends_with(" bytes of shared memory a block; allowed on this GPU: 101376")
    };
    let small = explained(&["--arch=sm_86"]);
    assert!(small.iter().any(said), "{small:?}");
    assert_eq!(backward(&["--deterministic"]), ordered);

    let answer = answers(["info", "--explain-dispatch", "--arch=sm_80", "--dtype=f32", "--headdim=300"]);
    assert!(answer["forward"]["refused"].as_str().is_some_and(|reason| reason.contains("headdim 300")), "{answer}");
    for alone in ["--arch=sm_90", "--causal", "--varlen"] {
        assert!(fails(2, ["info", alone]).contains("--explain-dispatch"), "{alone}");
    }
}

/// What of the problem chose each kernel among those of its table.
#[test]
fn info_explains_which_kernel_of_a_table_it_is() {
    let reasons = |pass: &str, arguments: &[&str]| {
        let answer = answers([&["info", "--explain-dispatch", "--dtype=f16"][..], arguments].concat());
        let launches = answer[pass]["launches"].as_array().expect("a list").clone();
        launches.iter().map(|launch| launch["for"].as_str().expect("words").to_owned()).collect::<Vec<_>>()
    };
    let flash2 = |arguments: &[&str]| reasons("forward", &[&["--arch=sm_80"], arguments].concat());
    assert_eq!(flash2(&["--headdim=64"]), ["headdim 64, no mask"]);
    assert_eq!(flash2(&["--headdim=72", "--causal"]), ["the next longer heads, headdim 96, a causal mask"]);
    assert_eq!(flash2(&["--headdim=128", "--softcap=30"]), ["headdim 128, what its arguments ask for"]);
    let printed = succeeds(["info", "--explain-dispatch", "--arch=sm_80", "--headdim=64"]);
    assert!(printed.contains(" of shared memory; for headdim 64, no mask\n"), "{printed}");
    if succeeds(["ptx", "--arch=sm_90a"]).is_empty() {
        return println!("skipped: this build embeds no PTX for sm_90a");
    }
    let flash3 = |arguments: &[&str]| reasons("forward", &[&["--arch=sm_90", "--nheads-k=4"], arguments].concat());
    assert_eq!(flash3(&["--headdim=128", "--seqlen=1", "--seqlen-k=512"])[0], "headdim 128, no mask, few queries");
    // Of several tiles, which are for how many keys is the table's affair.
    let long = flash3(&["--headdim=64", "--seqlen=8192", "--causal"]);
    let keys = long[0].strip_prefix("headdim 64, a causal mask").expect("what it is for");
    assert!(keys.is_empty() || keys.ends_with(" keys or more"), "{keys}");
}

/// Why sums of dQ are in one place or another.
#[test]
fn info_explains_why_sums_are_where_they_are() {
    if succeeds(["ptx", "--arch=sm_90a"]).is_empty() {
        return println!("skipped: this build embeds no PTX for sm_90a");
    }
    let why = |arguments: &[&str]| {
        let answer = answers([&["info", "--explain-dispatch", "--arch=sm_90", "--headdim=128"], arguments].concat());
        answer["backward"]["reason"].as_str().expect("words").to_owned()
    };
    assert!(why(&["--batch=32", "--seqlen=512"]).ends_with("; fastest for many heads of few keys"));
    assert!(why(&["--seqlen=4096", "--deterministic"]).ends_with("; deterministic asks for it"));
    let ring = why(&["--batch=8", "--seqlen=2048"]);
    assert!(ring.contains(" heads of K at a time, ") && ring.contains(" MiB, stay in the L2 cache"), "{ring}");
}

#[test]
fn bad_files_are_refused() {
    let directory = Directory::new("files");
    refuses(["run", "/no/such/file.safetensors"], "cannot read /no/such/file.safetensors: No such file");
    refuses(["run", &directory.0.to_string_lossy()], "cannot read");
    let text = directory.path("text.safetensors");
    fs::write(&text, "these are no tensors").expect("written");
    refuses(["run", &text], &format!("{text} is not a safetensors file"));
    fs::write(&text, "").expect("written");
    refuses(["softmax", &text], &format!("{text} is not a safetensors file"));

    let input = directory.attention("in.safetensors", Dtype::F32, &[1, 8, 1, 32], &[1, 8, 1, 32]);
    let output = directory.path("no/such/directory/out.safetensors");
    refuses(["run", &input, "-o", &output], &format!("cannot write {output}"));
    refuses(["run", &input, "-o", &directory.0.to_string_lossy()], "it is a directory");
    refuses(["explain", "--svg", &output], &format!("cannot write {output}"));
}

#[test]
fn bad_tensors_are_refused() {
    let directory = Directory::new("tensors");
    let tensors = |name: &str, tensors: &[(&str, Dtype, &[usize])]| directory.tensors(name, tensors);
    let shape: &[usize] = &[1, 8, 2, 32];
    let f16 = Dtype::F16;

    let missing = tensors("missing", &[("k", f16, shape), ("query", f16, shape)]);
    refuses(["run", &missing], "has no tensor q; it has: k, query");
    refuses(["softmax", &missing], "has no tensor x; it has: k, query");
    let integers = tensors("integers", &[("q", Dtype::I64, shape), ("k", f16, shape), ("v", f16, shape)]);
    refuses(["run", &integers], "tensor q is I64; allowed: F32, F16, BF16, I32, U8, BOOL");
    let mixed = tensors("mixed", &[("q", f16, shape), ("k", Dtype::F32, shape), ("v", f16, shape)]);
    refuses(["run", &mixed], "k: dtype");
    let flat = tensors("flat", &[("q", f16, &[8, 32]), ("k", f16, shape), ("v", f16, shape)]);
    refuses(["run", &flat], "q: 2 dimensions; allowed: 4");
    let narrow = tensors("narrow", &[("q", f16, shape), ("k", f16, &[1, 8, 2, 16]), ("v", f16, shape)]);
    refuses(["run", &narrow], "k: headdim is 16; allowed: 32");
    let short = tensors("short", &[("q", f16, shape), ("k", f16, shape), ("v", f16, &[1, 7, 2, 32])]);
    refuses(["run", &short], "v: seqlen is 7; allowed: 8");
    let heads = directory.attention("heads", f16, &[1, 8, 3, 32], shape);
    refuses(["run", &heads], "nheads is 3, which is no multiple of nheads_k = 2");
    let odd = directory.attention("odd", f16, &[1, 8, 2, 48], &[1, 8, 2, 48]);
    refuses(["run", &odd, "--backend=simulator", "--kernel=flash1"], "flash1: headdim 48; allowed: 32, 64, 128");
    let long = directory.attention("long", f16, &[1, 8, 2, 2048], &[1, 8, 2, 2048]);
    refuses(["run", &long, "--backend=simulator", "--kernel=flash2"], "flash2: headdim 2048; allowed: up to ");
}

#[test]
fn bad_arguments_are_refused() {
    let directory = Directory::new("arguments");
    let input = directory.attention("in.safetensors", Dtype::F32, &[1, 8, 1, 32], &[1, 8, 1, 32]);
    for scale in ["NaN", "inf"] {
        refuses(["run", &input, "--softmax-scale", scale], "softmax_scale");
    }
    refuses(["run", &input, "--softcap=-1"], "softcap: -1; allowed: positive and finite");
    refuses(["run", &input, "--dropout=1"], "dropout_p: 1; allowed: at least 0, below 1");
    for (arguments, reason) in [
        (vec!["run", &input, "--backend", "tpu"], "possible values: auto, cuda, cpu, simulator"),
        (vec!["run", &input, "--kernel", "flash9"], "possible values: auto, standard, flash1, flash2"),
        (vec!["run", &input, "--softmax-scale", "large"], "--softmax-scale"),
        (vec!["run", &input, "--repetitions", "0"], "--repetitions"),
        (vec!["run", &input, "--window", "3"], "'3' for '--window <LEFT,RIGHT>': allowed: LEFT,RIGHT, as 128,0"),
        (vec!["run", &input, "--window", "3,few"], "\"few\"; allowed: a number, or all"),
        (vec!["run", &input, "--alibi", "steep"], "possible values: standard, file"),
        (vec!["run", &input, "--seed", "1"], "--dropout"),
        (vec!["run", &input, "--dlse"], "--backward"),
        (vec!["bench", "--window", "3"], "allowed: LEFT,RIGHT"),
        (vec!["softmax", &input, "--method", "three-pass"], "possible values: two-pass, online"),
        (vec!["explain", "--seqlen", "0"], "--seqlen"),
        (vec!["explain", "--headdim", "48"], "possible values: 32, 64, 128"),
        (vec!["explain", "--seqlens", "64,many"], "--seqlens"),
        (vec!["bench", "--seqlens", "64,0"], "--seqlens"),
        (vec!["bench", "--tokens", "64", "--batch", "1"], "--batch"),
        (vec!["bench", "--dtype", "f8"], "possible values: f32, f16, bf16"),
        (vec!["ptx", "-o", "kernels.ptx"], "ENTRY"),
        (vec!["run"], "INPUT"),
        (vec!["fly"], "unrecognized subcommand"),
        (vec![], "Usage"),
    ] {
        let message = fails(2, &arguments);
        assert!(message.contains(reason), "{message} does not say {reason}");
    }
}

#[test]
fn help_has_examples() {
    assert!(succeeds(["--help"]).contains("Examples:"));
    for command in ["run", "softmax", "explain", "bench", "ptx"] {
        assert!(succeeds([command, "--help"]).contains("Examples:"));
    }
    assert_eq!(succeeds(["--version"]).trim(), concat!("ferroflash ", env!("CARGO_PKG_VERSION")));
}

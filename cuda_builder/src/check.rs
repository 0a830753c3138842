//! What a kernel's PTX should not have: each of these has cost time or correctness before anyone noticed.
use std::fmt;

/// How often an entry's PTX does something that a kernel should not do, or not more often than its source says.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Census {
    /// Barriers of a block: `bar.sync`, `bar.arrive`, `bar.red`, and the same as `barrier` or `barrier.cta`. An
    /// optimiser that copies one into both arms of a branch makes a deadlock of it.
    pub barriers: u32,
    /// Statements about local memory: an array that is not in registers.
    pub local: u32,
    /// Function calls: something was not inlined.
    pub calls: u32,
    /// Statements that mention a panic: a check that was not optimised away.
    pub panics: u32,
    /// Loads, stores and atomics that do not say in which memory: slower, and they hide what is accessed.
    pub generic: u32,
}

/// What is wrong with an entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Complaint {
    /// Another number of barriers than in the source.
    Barriers {
        /// In the PTX.
        found: u32,
        /// In the source.
        expected: u32,
    },
    /// [`Census::local`].
    Local(u32),
    /// [`Census::calls`].
    Calls(u32),
    /// [`Census::panics`].
    Panics(u32),
    /// [`Census::generic`].
    Generic(u32),
}

impl Census {
    /// Counts.
    pub fn of(ptx: &str) -> Self {
        let mut census = Census::default();
        for statement in statements(ptx) {
            let opcode = statement.split_whitespace().next().unwrap_or_default();
            let parts: Vec<&str> = opcode.split(['.', ':']).collect();
            census.barriers += u32::from(is_barrier(&parts));
            census.local += u32::from(has_word(statement, ".local") || parts.contains(&"local"));
            census.calls += u32::from(parts[0] == "call");
            census.panics += u32::from(statement.contains("panic"));
            census.generic += u32::from(is_generic(&parts));
        }
        census
    }

    /// What is wrong, given the number of barriers in the source, where it is known.
    pub fn complaints(&self, barriers: Option<u32>) -> Vec<Complaint> {
        let barriers = barriers.filter(|expected| self.barriers != *expected);
        let barriers = barriers.map(|expected| Complaint::Barriers { found: self.barriers, expected });
        let some = |count: u32, complaint: fn(u32) -> Complaint| (count > 0).then(|| complaint(count));
        let others = [
            some(self.local, Complaint::Local),
            some(self.calls, Complaint::Calls),
            some(self.panics, Complaint::Panics),
            some(self.generic, Complaint::Generic),
        ];
        barriers.into_iter().chain(others.into_iter().flatten()).collect()
    }
}

impl fmt::Display for Complaint {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        match self {
            Complaint::Barriers { found, expected } => {
                write!(f, "{found} barriers where its source has {expected}: one was copied or removed")
            }
            Complaint::Local(n) => {
                write!(f, "{n} statements use local memory: an array has an index that is not a constant")
            }
            Complaint::Calls(n) => write!(f, "{n} calls: a function was not inlined"),
            Complaint::Panics(n) => write!(f, "{n} mentions of a panic: a check was not optimised away"),
            Complaint::Generic(n) => {
                write!(f, "{n} generic memory accesses: a pointer is used outside of the words of cuda_std")
            }
        }
    }
}

fn is_barrier(opcode: &[&str]) -> bool {
    match opcode {
        ["bar" | "barrier", "cta", operation, ..] | ["bar" | "barrier", operation, ..] => {
            matches!(*operation, "sync" | "arrive" | "red")
        }
        _ => false,
    }
}

fn is_generic(opcode: &[&str]) -> bool {
    let accesses = matches!(opcode[0], "ld" | "ldu" | "st" | "atom" | "red");
    accesses && !opcode.iter().any(|part| matches!(*part, "global" | "shared" | "const" | "param" | "local"))
}

fn has_word(statement: &str, word: &str) -> bool {
    statement.split(|c: char| c.is_whitespace() || c == ',').any(|other| other == word)
}

/// Statements without labels and predicates. Braces separate: a block's first statement follows one directly, and what
/// follows a vector of operands is no opcode.
fn statements(ptx: &str) -> impl Iterator<Item = &str> {
    ptx.split([';', '{', '}']).map(|statement| {
        let mut statement = statement.trim();
        while let Some((label, rest)) = statement.split_once(':')
            && !rest.starts_with(':')
            && label.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '_' | '$' | '%'))
        {
            statement = rest.trim_start();
        }
        match statement.strip_prefix('@') {
            Some(predicated) => predicated.split_once(char::is_whitespace).map_or("", |(_, rest)| rest.trim_start()),
            None => statement,
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_clean_kernel() {
        let ptx = r"
.visible .entry f(
	.param .align 8 .b8 f_param_0[16]
)
{
	.reg .b32 	%r<5>;
	ld.param.b64 	%rd1, [f_param_0];
	{ .shared .align 16 .b8 buf[256]; mov.u32 %r2, buf; }
$L__BB0_1:
	bar.sync 	0;
	@%p1 bra 	$L__BB0_2;
	{ .reg .pred p; setp.ne.u32 p, %r1, 0; @p st.shared.v2.b32 [%r2], {%r3, %r4}; }
	barrier.cta.sync.aligned 1, 64;
	mbarrier.try_wait.parity.shared::cta.b64 p, [%r2], 1;
	bar.warp.sync 	-1;
	ld.global.nc.L1::no_allocate.v4.b32 {%r1, %r2, %r3, %r4}, [%rd1];
	ld.relaxed.gpu.global.b32 %r1, [%rd1];
	st.shared::cluster.b32 [%r1], %r2;
	red.global.add.f32 [%rd1], %r2;
	cp.async.cg.shared.global [%r1], [%rd1], 16;
$L__BB0_2:
	ret;
}";
        let census = Census::of(ptx);
        assert_eq!(census, Census { barriers: 2, ..Census::default() });
        assert_eq!(census.complaints(Some(2)), []);
        assert_eq!(census.complaints(None), []);
    }

    #[test]
    fn barriers() {
        let ptx = "L: @%p1 bar.sync 0; { bar.arrive 1, 64; } barrier.red.popc.u32 %r1, 0, p; barrier.cluster.arrive;";
        assert_eq!(Census::of(ptx).barriers, 3);
        let expected = Complaint::Barriers { found: 3, expected: 2 };
        assert_eq!(Census::of(ptx).complaints(Some(2)), [expected]);
    }

    #[test]
    fn local_memory() {
        assert_eq!(Census::of(".local .align 16 .b8 __local_depot0[64];").local, 1);
        assert_eq!(Census::of("ld.local.b32 %r1, [%rd1]; cvta.local.u64 %SP, %SPL;").local, 2);
        assert_eq!(Census::of("mov.u32 %r1, my.local_name;").local, 0);
        assert_eq!(Census { local: 2, ..Census::default() }.complaints(Some(0)), [Complaint::Local(2)]);
    }

    #[test]
    fn calls_and_panics() {
        let ptx = "@%p2 call.uni _ZN4core9panicking18panic_bounds_check17h0E, (param0); { call (r), f, (p); }";
        let census = Census::of(ptx);
        assert_eq!((census.calls, census.panics), (2, 1));
        assert_eq!(census.complaints(None), [Complaint::Calls(2), Complaint::Panics(1)]);
    }

    #[test]
    fn generic_accesses() {
        let ptx = "ld.b32 a, [b]; @p st.v4.b32 [b], {a, a, a, a}; atom.add.f32 a, [b], c; ldu.b32 a, [b];";
        assert_eq!(Census::of(ptx).generic, 4);
        assert_eq!(
            Census::of("ld.volatile.b32 %r1, [%rd1]; ldmatrix.sync.aligned.m8n8.x4.shared.b16 {a}, [b];").generic,
            1
        );
        assert_eq!(Census { generic: 1, ..Census::default() }.complaints(None), [Complaint::Generic(1)]);
    }
}

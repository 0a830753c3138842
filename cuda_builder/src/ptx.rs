//! PTX as text: a module, its entry points, and the directives that rustc cannot write.
//!
//! A module's launch bounds are comments of the form `// .launch_bounds NAME THREADS MIN_BLOCKS`, which the attribute
//! `#[kernel]` of `cuda_std` leaves; they become `.maxntid THREADS, 1, 1` and `.minnctapersm MIN_BLOCKS`. Clusters are
//! comments `// .cluster NAME BLOCKS`, and become `.explicitcluster` and `.reqnctapercluster BLOCKS, 1, 1`.
//!
//! An entry that takes the address of its parameters, where tensor maps are, says `kernel_parameters` for the first of
//! them: inline assembly does not know the entry that it ends up in. The parameter is then aligned to 64 bytes, as
//! tensor maps are to be, which rustc cannot say of a parameter.
use std::collections::{BTreeMap, BTreeSet};

const LAUNCH_BOUNDS: &str = "// .launch_bounds ";
const CLUSTER: &str = "// .cluster ";
const KERNEL_PARAMETERS: &str = "kernel_parameters";

/// A module, taken apart.
#[derive(Clone, Debug)]
pub struct Module {
    /// `.version`, `.target` and `.address_size`.
    header: Vec<String>,
    items: Vec<Item>,
    launch_bounds: BTreeMap<String, LaunchBounds>,
    /// Blocks of a cluster.
    clusters: BTreeMap<String, u32>,
}

/// The largest block that an entry is launched with, and how many of them are to fit one multiprocessor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LaunchBounds {
    /// Threads of a block.
    pub threads: u32,
    /// Blocks.
    pub min_blocks: u32,
}

/// An entry point as a module of its own: the header, what the entry uses, the entry.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// The name that a host loads it by.
    pub name: String,
    /// Its launch bounds, if its source states some.
    pub launch_bounds: Option<LaunchBounds>,
    /// The module.
    pub text: String,
}

/// A text that is not PTX as LLVM writes it.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ParseError {
    /// The text ends within a declaration.
    #[error("the PTX ends within `{0}`")]
    Unfinished(String),
    /// There is no `.version`, `.target` or `.address_size`.
    #[error("the PTX has no `{0}`")]
    Header(&'static str),
    /// A declaration without a name.
    #[error("the PTX declares something without a name: `{0}`")]
    Unnamed(String),
    /// A comment with launch bounds that are not two numbers.
    #[error("these launch bounds are not a name and two numbers above 0: `{0}`")]
    LaunchBounds(String),
    /// Launch bounds for an entry that is not there, or given twice.
    #[error("launch bounds for `{0}`, which is not an entry, or has them already")]
    NoEntry(String),
    /// A cluster of no blocks, or of an entry that is not there.
    #[error("this cluster is not that of an entry, with a number of blocks above 0: `{0}`")]
    Cluster(String),
}

/// A declaration at the top of a module.
#[derive(Clone, Debug)]
struct Item {
    kind: Kind,
    name: String,
    text: String,
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Kind {
    Entry,
    Function,
    Variable,
}

impl Module {
    /// Takes a module apart. Comments and empty lines are left out.
    pub fn parse(text: &str) -> Result<Self, ParseError> {
        let mut module =
            Module { header: Vec::new(), items: Vec::new(), launch_bounds: BTreeMap::new(), clusters: BTreeMap::new() };
        let mut rest = &*without_comments(text);
        while let Some(item) = next_item(&mut rest)? {
            if item.starts_with(".version") || item.starts_with(".target") || item.starts_with(".address_size") {
                module.header.push(item.to_owned());
            } else {
                module.items.push(Item::parse(item)?);
            }
        }
        for directive in [".version", ".target", ".address_size"] {
            if !module.header.iter().any(|line| line.starts_with(directive)) {
                return Err(ParseError::Header(directive));
            }
        }
        for comment in text.lines().filter_map(|line| line.trim().strip_prefix(LAUNCH_BOUNDS)) {
            let (name, bounds) = LaunchBounds::parse(comment)?;
            let is_entry = module.items.iter().any(|item| item.kind == Kind::Entry && item.name == name);
            if !is_entry || module.launch_bounds.insert(name.to_owned(), bounds).is_some() {
                return Err(ParseError::NoEntry(name.to_owned()));
            }
        }
        for comment in text.lines().filter_map(|line| line.trim().strip_prefix(CLUSTER)) {
            let (name, blocks) = comment.split_once(' ').unwrap_or_default();
            let is_entry = module.items.iter().any(|item| item.kind == Kind::Entry && item.name == name);
            match blocks.parse() {
                Ok(blocks) if blocks > 0 && is_entry => module.clusters.insert(name.to_owned(), blocks),
                _ => return Err(ParseError::Cluster(comment.to_owned())),
            };
        }
        Ok(module)
    }

    /// Each entry as a module of its own, by name.
    pub fn entries(&self) -> Result<Vec<Entry>, ParseError> {
        let entries = self.items.iter().filter(|item| item.kind == Kind::Entry);
        let mut entries = entries.map(|item| self.entry(item)).collect::<Result<Vec<_>, _>>()?;
        entries.sort_by(|a, b| a.name.cmp(&b.name));
        Ok(entries)
    }

    fn entry(&self, entry: &Item) -> Result<Entry, ParseError> {
        let used = self.used_by(entry);
        let launch_bounds = self.launch_bounds.get(&entry.name).copied();
        let mut text = self.header.join("\n");
        text.push_str("\n\n");
        // A function may be declared before it is defined, under the same name.
        for item in self.items.iter().filter(|item| item.kind != Kind::Entry && used.contains(&*item.name)) {
            text.push_str(&item.text);
            text.push_str("\n\n");
        }
        let (head, body) = entry.text.split_once('{').ok_or_else(|| ParseError::Unfinished(entry.text.clone()))?;
        let parameter = format!("{}_param_0", entry.name);
        let head = match body.contains(KERNEL_PARAMETERS) {
            true => head.replace(&format!(".align 16 .b8 {parameter}["), &format!(".align 64 .b8 {parameter}[")),
            false => head.to_owned(),
        };
        text.push_str(head.trim_end());
        text.push('\n');
        if let Some(LaunchBounds { threads, min_blocks }) = launch_bounds {
            text.push_str(&format!(".maxntid {threads}, 1, 1\n.minnctapersm {min_blocks}\n"));
        }
        if let Some(blocks) = self.clusters.get(&entry.name) {
            text.push_str(&format!(".explicitcluster\n.reqnctapercluster {blocks}, 1, 1\n"));
        }
        text.push('{');
        text.push_str(&with_own_labels(body).replace(KERNEL_PARAMETERS, &parameter));
        text.push('\n');
        Ok(Entry { name: entry.name.clone(), launch_bounds, text })
    }

    /// The names that an item mentions, and that what it mentions mentions.
    fn used_by<'a>(&'a self, item: &'a Item) -> BTreeSet<&'a str> {
        let mut used = BTreeSet::new();
        let mut todo = vec![item];
        while let Some(item) = todo.pop() {
            for name in identifiers(&item.text) {
                let mentioned = self.items.iter().filter(|other| other.kind != Kind::Entry && other.name == name);
                if used.insert(name) {
                    todo.extend(mentioned);
                }
            }
        }
        used
    }
}

impl Item {
    fn parse(text: &str) -> Result<Self, ParseError> {
        let unnamed = || ParseError::Unnamed(text.lines().next().unwrap_or_default().to_owned());
        let (kind, mut rest) = if let Some((_, rest)) = text.split_once(".entry") {
            (Kind::Entry, rest)
        } else if let Some((_, rest)) = text.split_once(".func") {
            (Kind::Function, rest)
        } else {
            (Kind::Variable, text)
        };
        // What a function returns stands before its name.
        if kind == Kind::Function && rest.trim_start().starts_with('(') {
            rest = rest.split_once(')').ok_or_else(unnamed)?.1;
        }
        // A variable has no parentheses.
        let rest = rest.split('(').next().unwrap_or_default();
        let is_name = |word: &&str| !word.starts_with(|c: char| c == '.' || c.is_ascii_digit());
        let name = identifiers(rest).find(is_name).ok_or_else(unnamed)?.to_owned();
        Ok(Item { kind, name, text: text.to_owned() })
    }
}

impl LaunchBounds {
    fn parse(comment: &str) -> Result<(&str, Self), ParseError> {
        let number = |word: &str| word.parse().ok().filter(|n| *n > 0);
        let fields: Vec<_> = comment.split_whitespace().collect();
        if let [name, threads, min_blocks] = fields[..]
            && let (Some(threads), Some(min_blocks)) = (number(threads), number(min_blocks))
        {
            return Ok((name, LaunchBounds { threads, min_blocks }));
        }
        Err(ParseError::LaunchBounds(comment.to_owned()))
    }
}

/// The words of a text; those that begin with a dot are directives.
fn identifiers(text: &str) -> impl Iterator<Item = &str> {
    let in_word = |c: char| c.is_ascii_alphanumeric() || matches!(c, '_' | '$' | '%' | '.');
    text.split(move |c| !in_word(c)).filter(|word| !word.is_empty())
}

/// The text without comments, without trailing blanks and without empty lines.
fn without_comments(text: &str) -> String {
    let mut kept = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(slash) = rest.find('/') {
        let (before, comment) = rest.split_at(slash);
        kept.push_str(before);
        rest = match comment.as_bytes() {
            [b'/', b'/', ..] => comment.find('\n').map_or("", |end| &comment[end..]),
            [b'/', b'*', ..] => comment.split_once("*/").map_or("", |(_, after)| after),
            _ => {
                kept.push('/');
                &comment[1..]
            }
        };
    }
    kept.push_str(rest);
    let lines = kept.lines().map(str::trim_end);
    lines.filter(|line| !line.is_empty()).collect::<Vec<_>>().join("\n")
}

/// LLVM numbers labels by function, `$L__BB7_2`: without the 7 an entry stays as it is when others come and go.
fn with_own_labels(body: &str) -> String {
    const LABEL: &str = "$L__BB";
    let mut parts = body.split(LABEL);
    let mut own = parts.next().unwrap_or_default().to_owned();
    for part in parts {
        own.push_str(LABEL);
        own.push_str(part.trim_start_matches(|c: char| c.is_ascii_digit()));
    }
    own
}

/// Takes the next declaration off `rest`: a header directive is a line, a body ends with its brace, all else with `;`.
fn next_item<'a>(rest: &mut &'a str) -> Result<Option<&'a str>, ParseError> {
    let text = rest.trim_start();
    if text.is_empty() {
        return Ok(None);
    }
    let is_line = [".version", ".target", ".address_size"].iter().any(|directive| text.starts_with(directive));
    let end = if is_line { Some(text.find('\n').unwrap_or(text.len())) } else { end_of_declaration(text) };
    let end = end.ok_or_else(|| ParseError::Unfinished(text.lines().next().unwrap_or_default().to_owned()))?;
    let (item, after) = text.split_at(end);
    *rest = after;
    Ok(Some(item.trim_end()))
}

fn end_of_declaration(text: &str) -> Option<usize> {
    let mut depth = 0;
    let mut has_body = false;
    for (i, c) in text.char_indices() {
        match c {
            '{' => {
                has_body |= depth == 0 && identifiers(&text[..i]).any(|word| matches!(word, ".entry" | ".func"));
                depth += 1;
            }
            '}' => {
                depth -= 1;
                if depth == 0 && has_body {
                    return Some(i + 1);
                }
            }
            ';' if depth == 0 => return Some(i + 1),
            _ => {}
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    const MODULE: &str = r"//
// Generated by LLVM NVPTX Back-End
//

.version 7.8
.target sm_80
.address_size 64

	// .launch_bounds second 128 2
.extern .shared .align 1024 .b8 dyn_smem[];
.extern .func  (.param .b32 func_retval0) helper
(
	.param .b32 helper_param_0
)
;
.global .align 4 .b8 table[8] = {1, 2, 3, 4, 5, 6, 7, 8};
.global .align 8 .u64 pointer = table;

	// .globl	second

.visible .entry second(
	.param .u64 .ptr .align 1 second_param_0
)
{
	.reg .b32 	%r<5>;
	// begin inline asm
	{ .reg .pred p; mov.u32 %r1, dyn_smem; }
	// end inline asm
$L__BB7_1:                              // =>This Inner Loop Header: Depth=1
	bar.sync 	0;
	ret;

}
.visible .entry first()
{
	ld.global.b64 %rd1, [pointer]; /* a
	comment */
	ret;
}
.func  (.param .b32 func_retval0) helper(
	.param .b32 helper_param_0
)
{
	ret;
}
.visible .entry third() { call.uni (retval0), helper, (param0); ret; }
";

    fn entries(text: &str) -> Vec<Entry> {
        Module::parse(text).unwrap().entries().unwrap()
    }

    #[test]
    fn an_entry_is_a_module_with_what_it_uses() {
        let entries = entries(MODULE);
        assert_eq!(entries.iter().map(|entry| &*entry.name).collect::<Vec<_>>(), ["first", "second", "third"]);
        let expected = r".version 7.8
.target sm_80
.address_size 64

.extern .shared .align 1024 .b8 dyn_smem[];

.visible .entry second(
	.param .u64 .ptr .align 1 second_param_0
)
.maxntid 128, 1, 1
.minnctapersm 2
{
	.reg .b32 	%r<5>;
	{ .reg .pred p; mov.u32 %r1, dyn_smem; }
$L__BB_1:
	bar.sync 	0;
	ret;
}
";
        assert_eq!(entries[1].text, expected);
        assert_eq!(entries[1].launch_bounds, Some(LaunchBounds { threads: 128, min_blocks: 2 }));
        assert_eq!(entries[0].launch_bounds, None);
    }

    #[test]
    fn clusters_and_addresses_of_parameters() {
        let parameter = ".visible .entry third(.param .align 16 .b8 third_param_0[272])";
        let body = "{ { .reg .b64 at; mov.b64 at, kernel_parameters; cvta.param.u64 at, at; } ret; }";
        let text = format!("// .cluster third 2\n// .launch_bounds third 384 1\n{MODULE}");
        let text = text.replace(".visible .entry third() { call.uni (retval0), helper, (param0); ret; }", parameter);
        let third = &entries(&(text.clone() + body))[2].text;
        assert!(third.contains(".entry third(.param .align 64 .b8 third_param_0[272])"), "{third}");
        let directives = ".maxntid 384, 1, 1\n.minnctapersm 1\n.explicitcluster\n.reqnctapercluster 2, 1, 1\n{";
        assert!(third.contains(directives), "{third}");
        assert!(third.contains("mov.b64 at, third_param_0;"), "{third}");
        let error = Module::parse(&(text.replace("cluster third 2", "cluster third 0") + body)).unwrap_err();
        assert_eq!(error, ParseError::Cluster("third 0".to_owned()));
    }

    #[test]
    fn uses_are_followed() {
        let entries = entries(MODULE);
        let first = &entries[0].text;
        assert!(first.contains("table[8] = {1,") && first.contains("pointer = table;") && !first.contains("dyn_smem"));
        let third = &entries[2].text;
        assert_eq!(
            third.matches(" helper").count(),
            3 + 2,
            "a declaration, a definition, a call and two parameters: {third}"
        );
    }

    #[test]
    fn an_entry_is_the_same_alone() {
        for entry in entries(MODULE) {
            let alone = entries_without_bounds(&entry.text);
            assert_eq!(alone, [entry.text]);
        }
    }

    fn entries_without_bounds(text: &str) -> Vec<String> {
        entries(text).into_iter().map(|entry| entry.text).collect()
    }

    #[test]
    fn bounds_for_nothing() {
        let error = |comment: &str| Module::parse(&format!("{comment}\n{MODULE}")).unwrap_err();
        assert_eq!(error("// .launch_bounds fourth 1 1"), ParseError::NoEntry("fourth".to_owned()));
        assert_eq!(error("// .launch_bounds second 1 1"), ParseError::NoEntry("second".to_owned()));
        assert_eq!(error("// .launch_bounds helper 1 1"), ParseError::NoEntry("helper".to_owned()));
        assert_eq!(error("// .launch_bounds first 0 1"), ParseError::LaunchBounds("first 0 1".to_owned()));
        assert_eq!(error("// .launch_bounds first 1"), ParseError::LaunchBounds("first 1".to_owned()));
    }

    #[test]
    fn texts_that_are_no_module() {
        let error = |text: &str| Module::parse(text).unwrap_err();
        assert_eq!(error(""), ParseError::Header(".version"));
        assert_eq!(error(".version 7.8\n.target sm_80\n"), ParseError::Header(".address_size"));
        assert_eq!(
            error(&MODULE.replace("ret; }", "ret;")),
            ParseError::Unfinished(".visible .entry third() { call.uni (retval0), helper, (param0); ret;".to_owned())
        );
        assert_eq!(
            error(&MODULE.replace("third", "")),
            ParseError::Unnamed(".visible .entry () { call.uni (retval0), helper, (param0); ret; }".to_owned())
        );
    }
}

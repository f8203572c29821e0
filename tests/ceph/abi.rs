//! Our declarations of librados and librbd (`src/backend/rbd/sys.rs`) against Ceph's own headers: a C compiler is given
//! each function to assign to a pointer of the type that we call it by, and each constant, structure and named type to
//! compare. Needs librados-dev and librbd-dev, and no cluster.

use std::fmt::Write;
use std::fs;
use std::path::Path;
use std::process::Command;

fn declarations() -> String {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("src/backend/rbd/sys.rs");
    fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

/// A declaration of C's that stands in `sys.rs`, and the Ceph release that brought it, where `sys.rs` names one.
struct Check {
    code: String,
    since: Option<u32>,
}

#[derive(Default)]
struct Checks {
    all: Vec<Check>,
    functions: usize,
    constants: usize,
    types: usize,
    fields: usize,
}

/// Reads `sys.rs` line by line: that form is what it promises.
fn checks(text: &str) -> Checks {
    let mut checks = Checks::default();
    let (mut since, mut structure) = (None, None::<String>);
    for line in text.lines().map(str::trim).take_while(|line| *line != "mod tests {") {
        if let Some(doc) = line.strip_prefix("///") {
            since = since.or(release(doc));
            continue;
        }
        let line = line.strip_prefix("pub(super) ").unwrap_or(line);
        let mut add = |code| checks.all.push(Check { code, since });
        if let Some(name) = &structure {
            if let Some((field, kind)) = line.strip_prefix("pub ").and_then(|rest| rest.split_once(": ")) {
                let kind = c_type(kind.trim_end_matches(','));
                add(format!(
                    "static {kind} *field_{name}_{field}(void) {{ static {name} all; return &all.{field}; }}\n\
                     _Static_assert(offsetof({name}, {field}) == offsetof(struct our_{name}, {field}), \"{name}.{field}\");"
                ));
                checks.fields += 1;
            } else if line == "}" {
                add(format!("_Static_assert(sizeof({name}) == sizeof(struct our_{name}), \"{name}\");"));
                (structure, since) = (None, None);
            }
            continue;
        }
        if let Some(rest) = line.strip_prefix("type ") {
            let (name, kind) = rest.trim_end_matches(';').split_once(" = ").expect("a type");
            add(same_type(name, kind));
            checks.types += 1;
        } else if let Some(rest) = line.strip_prefix("const ") {
            let (name, value) = rest.trim_end_matches(';').split_once(" = ").expect("a constant");
            let name = name.split(':').next().expect("a name");
            add(format!("_Static_assert({name} == {value}, \"{name}\");"));
            checks.constants += 1;
        } else if let Some(name) = line.strip_prefix("struct ").and_then(|rest| rest.strip_suffix("_t {")) {
            let name = format!("{name}_t");
            add(our_structure(text, &name));
            structure = Some(name);
            continue;
        } else if let Some(rest) = line.strip_prefix("fn r").filter(|_| line.ends_with(';')) {
            let (name, signature) = rest.split_once('(').expect("a function");
            let (arguments, result) = signature.trim_end_matches(';').rsplit_once(')').expect("a function");
            let arguments = arguments.split(", ").map(|argument| argument.split_once(": ").expect("an argument").1);
            let pointer = function_pointer(&format!("our_r{name}"), arguments, result);
            add(format!("{pointer} = r{name};"));
            checks.functions += 1;
        }
        // Attributes stand between a comment and what it is about.
        if !line.starts_with("#[") {
            since = None;
        }
    }
    checks
}

/// "since Ceph 17" in a comment.
fn release(doc: &str) -> Option<u32> {
    let (_, after) = doc.split_once("ince Ceph ")?;
    after.chars().take_while(char::is_ascii_digit).collect::<String>().parse().ok()
}

/// `RESULT (*NAME)(ARGUMENTS)`; `result` as it stands after the parentheses: empty, or ` -> TYPE`.
fn function_pointer<'a>(name: &str, arguments: impl Iterator<Item = &'a str>, result: &str) -> String {
    let arguments: Vec<String> = arguments.map(c_type).collect();
    let result = result.trim().strip_prefix("-> ").map_or("void".into(), c_type);
    format!("{result} (*{name})({})", arguments.join(", "))
}

fn c_type(rust: &str) -> String {
    if let Some(to) = rust.strip_prefix("*mut ") {
        return format!("{} *", c_type(to));
    }
    if let Some(to) = rust.strip_prefix("*const ") {
        return format!("{} const *", c_type(to));
    }
    match rust {
        "c_void" => "void",
        "c_char" => "char",
        "c_int" => "int",
        "u64" => "uint64_t",
        "u32" => "uint32_t",
        "u8" => "uint8_t",
        "iovec" => "struct iovec",
        // What Ceph's headers name so, and what C does.
        named if named.ends_with("_t") => named,
        other => panic!("sys.rs: what is '{other}' in C?"),
    }
    .into()
}

/// A name that is both Ceph's and ours stands for the same.
fn same_type(name: &str, rust: &str) -> String {
    let callback = rust.strip_prefix("Option<unsafe extern \"C\" fn(").and_then(|rest| rest.strip_suffix('>'));
    if let Some((arguments, result)) = callback.and_then(|signature| signature.rsplit_once(')')) {
        let pointer = function_pointer("", arguments.split(", "), result);
        return format!("_Static_assert(__builtin_types_compatible_p({name}, {pointer}), \"{name}\");");
    }
    match c_type(rust) {
        pointer if pointer.ends_with('*') => {
            format!("_Static_assert(__builtin_types_compatible_p({name}, {pointer}), \"{name}\");")
        }
        // An enumeration is an integer type of the compiler's choice.
        number => format!(
            "_Static_assert(sizeof({name}) == sizeof({number}) && (({name})-1 > 0) == (({number})-1 > 0), \"{name}\");"
        ),
    }
}

/// The structure as we lay it out.
fn our_structure(text: &str, name: &str) -> String {
    let (_, body) = text.split_once(&format!("struct {name} {{\n")).expect("seen before");
    let body = body.split_once('}').expect("an end").0;
    let mut c = format!("struct our_{name} {{ ");
    for (field, kind) in body.lines().filter_map(|line| line.trim().strip_prefix("pub ")?.split_once(": ")) {
        write!(c, "{} {field}; ", c_type(kind.trim_end_matches(','))).expect("a string");
    }
    c + "};"
}

/// What the compiler says to all of it; `Ok` if nothing.
fn compile(text: &str) -> Result<(), String> {
    // Ceph 16 has librbd 1.16, and so on.
    let mut c = "#include <stddef.h>\n#include <sys/uio.h>\n#include <rados/librados.h>\n#include <rbd/librbd.h>\n\
                 #include <rbd/features.h>\n"
        .to_string();
    // Ceph's header has no name for it; the function that takes it is compared all the same.
    c += "typedef int (*rbd_diff_callback_t)(uint64_t, size_t, int, void *);\n";
    for Check { code, since } in checks(text).all {
        match since {
            Some(since) => writeln!(c, "#if LIBRBD_VERSION_CODE >= LIBRBD_VERSION(1, {since}, 0)\n{code}\n#endif"),
            None => writeln!(c, "{code}"),
        }
        .expect("a string");
    }
    let dir = tempfile::tempdir().expect("a directory");
    let source = dir.path().join("declarations.c");
    fs::write(&source, c).expect("a source file");
    let output = Command::new("cc")
        .args(["-std=gnu11", "-Wall", "-Werror", "-Wno-unused-function", "-Wno-unused-variable", "-fsyntax-only"])
        .arg(&source)
        .output()
        .expect("cc: 'make check-rbd' installs what this test needs");
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    if output.status.success() && said.is_empty() { Ok(()) } else { Err(said) }
}

#[test]
fn our_declarations_equal_cephs_headers() {
    let text = declarations();
    compile(&text).unwrap_or_else(|said| panic!("'make check-rbd' installs Ceph's headers; cc says:\n{said}"));
    // None was passed over because it stands in another form.
    let found = checks(&text);
    let part = text.split("#[cfg(test)]").next().expect("the part before the tests");
    let count = |what: &str| part.matches(what).count();
    assert_eq!(found.functions, count("\n        fn r"), "functions");
    assert_eq!(found.constants, count("const R"), "constants");
    assert_eq!(found.types, count("\npub(super) type "), "types");
    assert_eq!(found.fields, count("\n    pub passphrase") + count("\n    pub alg") + 3, "fields");
    assert!(found.functions > 40, "{} functions", found.functions);
}

#[test]
fn a_wrong_declaration_does_not_compile() {
    let text = declarations();
    assert_eq!(compile(&text), Ok(()), "without a change");
    let mutants = [
        // An argument of another width, a missing one, another order, another result.
        ("fn rbd_aio_discard(image: rbd_image_t, off: u64", "fn rbd_aio_discard(image: rbd_image_t, off: u32"),
        ("fn rbd_aio_flush(image: rbd_image_t, c: rbd_completion_t)", "fn rbd_aio_flush(image: rbd_image_t)"),
        ("fn rbd_flush(image: rbd_image_t) -> c_int;", "fn rbd_flush(image: rbd_image_t) -> u64;"),
        ("fn rados_shutdown(cluster: rados_t);", "fn rados_shutdown(cluster: rados_t) -> c_int;"),
        ("iov: *const iovec, iovcnt: c_int", "iovcnt: c_int, iov: *const iovec"),
        ("size: *mut u64) -> c_int;", "size: u64) -> c_int;"),
        // A constant, a callback, a structure's order and size.
        ("RBD_LOCK_MODE_EXCLUSIVE: rbd_lock_mode_t = 0", "RBD_LOCK_MODE_EXCLUSIVE: rbd_lock_mode_t = 1"),
        ("fn(rbd_completion_t, *mut c_void)>;", "fn(*mut c_void)>;"),
        ("type rbd_lock_mode_t = u32;", "type rbd_lock_mode_t = u64;"),
        (
            "    pub name: *mut c_char,\n    pub value: *mut c_char,\n    pub source: rbd_config_source_t,\n",
            "    pub source: rbd_config_source_t,\n    pub name: *mut c_char,\n    pub value: *mut c_char,\n",
        ),
        ("    pub source: rbd_config_source_t,\n", ""),
        ("fn rbd_get_size(", "fn rbd_get_length("),
    ];
    for (right, wrong) in mutants {
        assert!(text.contains(right), "sys.rs has no '{right}': take another mutant");
        assert!(compile(&text.replace(right, wrong)).is_err(), "not noticed: '{wrong}'");
    }
}

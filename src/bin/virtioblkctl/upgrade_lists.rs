//! Changes the options that may be given several times, at an upgrade: `-- --copy-dir DIR` replaces the running daemon's
//! list, and `--add copy-dir=DIR` adds to it.

use std::fs;
use std::path::Path;

use virtioblkd::internal::base::text::shown;

/// Options that may be given several times.
const LISTS: [&str; 3] = ["copy-dir", "rbd-option", "throttle"];

/// A value that is added to a list.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Added {
    option: String,
    value: String,
}

/// Parses the value of `--add`.
pub fn parse(text: &str) -> Result<Added, String> {
    match text.strip_prefix("--").unwrap_or(text).split_once('=') {
        Some((option, value)) if LISTS.contains(&option) && !value.is_empty() => {
            Ok(Added { option: option.to_owned(), value: value.to_owned() })
        }
        _ => {
            Err("use copy-dir=DIR, rbd-option=NAME=VALUE or throttle=NAME=VALUE; give other options once, after --"
                .into())
        }
    }
}

/// Returns the running daemon's arguments with `added` appended. An error says why that is not possible, and what is.
pub fn add(mut old: Vec<String>, added: &[Added]) -> Result<Vec<String>, String> {
    for Added { option, .. } in added {
        // A list on the command line replaces that of the configuration file, which this program has not read.
        if values(&old, option).is_empty() && !values(&old, "config").is_empty() {
            return Err(format!(
                "--add {option}: the running daemon reads its list from its --config file: add the value there, or give all \
                 values after --"
            ));
        }
    }
    old.extend(added.iter().map(|Added { option, value }| format!("--{option}={value}")));
    Ok(old)
}

/// Checks that the new directories for copies exist. virtioblkd serves a disk without them, for the sake of its guest, but an
/// operator who names one now wants it. `directory`: that of the running daemon, from which relative paths lead.
pub fn check_directories(directory: &str, added: &[Added], new: &[String]) -> Result<(), String> {
    let added =
        added.iter().filter(|added| added.option == "copy-dir").map(|added| ("--copy-dir", added.value.as_str()));
    let given = ["copy-dir", "scratch"].into_iter().zip(["--copy-dir", "--scratch"]);
    let given = given.flat_map(|(option, name)| values(new, option).into_iter().map(move |value| (name, value)));
    for (name, value) in added.chain(given) {
        let path = Path::new(directory).join(value);
        let why = match fs::metadata(&path) {
            Ok(found) if found.is_dir() => continue,
            Ok(_) => "it is not a directory".to_owned(),
            Err(error) => error.to_string(),
        };
        return Err(format!(
            "{name} '{}': {why}; create the directory first, or correct the path",
            shown(path.display())
        ));
    }
    Ok(())
}

/// Describes the values of the old lists that the new arguments drop, for the operator.
pub fn dropped(old: &[String], new: &[String]) -> Vec<String> {
    let describe = |option: &&str| {
        let (old, new) = (values(old, option), values(new, option));
        let dropped: Vec<&str> = old.iter().filter(|value| !new.contains(value)).copied().collect();
        (!new.is_empty() && !dropped.is_empty()).then(|| {
            format!("--{option} {} is dropped: use --add {option}=VALUE to keep the others", dropped.join(" and "))
        })
    };
    LISTS.iter().filter_map(describe).collect()
}

/// The values that `arguments` give to `option`.
fn values<'a>(arguments: &'a [String], option: &str) -> Vec<&'a str> {
    let mut found = Vec::new();
    let mut words = arguments.iter();
    while let Some(word) = words.next() {
        let Some(rest) = word.strip_prefix("--").and_then(|word| word.strip_prefix(option)) else { continue };
        match rest.strip_prefix('=') {
            Some(value) => found.push(value),
            None if rest.is_empty() => found.extend(words.next().map(String::as_str)),
            None => {}
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words(text: &str) -> Vec<String> {
        text.split_whitespace().map(str::to_owned).collect()
    }

    #[test]
    fn adding_extends_a_list_and_replacing_reports_the_dropped_values() {
        let old = words("--copy-dir /a --copy-dir=/b --cache none --rbd-option x=1");
        let added = [parse("copy-dir=/c").unwrap(), parse("--rbd-option=y=2").unwrap()];
        let all = add(old.clone(), &added).unwrap();
        assert_eq!(values(&all, "copy-dir"), ["/a", "/b", "/c"]);
        assert_eq!(values(&all, "rbd-option"), ["x=1", "y=2"]);
        assert_eq!(dropped(&old, &words("--cache unsafe")), [""; 0]);
        assert_eq!(dropped(&old, &words("--copy-dir /a --copy-dir /b --copy-dir /c")), [""; 0]);
        let text = dropped(&old, &words("--copy-dir=/b")).join("");
        assert!(text.contains("--copy-dir /a is dropped") && text.contains("--add copy-dir="), "{text}");
    }

    #[test]
    fn a_directory_that_does_not_exist_cannot_be_added() {
        let directory = tempfile::tempdir().unwrap();
        fs::create_dir(directory.path().join("there")).unwrap();
        fs::write(directory.path().join("file"), "").unwrap();
        let check = |add: &[&str], new: &str| {
            let added: Vec<Added> = add.iter().map(|text| parse(text).unwrap()).collect();
            check_directories(directory.path().to_str().unwrap(), &added, &words(new))
        };
        assert_eq!(
            check(&["copy-dir=there", "rbd-option=x=1"], "--copy-dir there --scratch=there --cache none"),
            Ok(())
        );
        for (add, new) in [(&["copy-dir=missing"][..], ""), (&[], "--copy-dir missing"), (&[], "--scratch=missing")] {
            let why = check(add, new).unwrap_err();
            assert!(why.contains("missing'") && why.contains("create the directory first"), "{why}");
        }
        assert!(check(&["copy-dir=file"], "").unwrap_err().contains("not a directory"));
    }

    #[test]
    fn an_option_without_a_list_or_with_an_unknown_list_cannot_be_added_to() {
        for text in ["cache=none", "copy-dir", "copy-dir=", "/c"] {
            assert!(parse(text).unwrap_err().contains("copy-dir=DIR"), "{text}");
        }
        let from_file = add(words("--config /etc/disk.toml"), &[parse("copy-dir=/c").unwrap()]);
        assert!(from_file.unwrap_err().contains("--config"), "the added list would replace the one in the file");
        assert!(add(words("--config d.toml --copy-dir /a"), &[parse("copy-dir=/c").unwrap()]).is_ok());
    }
}

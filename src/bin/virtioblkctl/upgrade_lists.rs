//! Options that may be given several times, at an upgrade: `-- --copy-dir DIR` replaces the running daemon's list, and
//! `--add copy-dir=DIR` adds to it.

/// Options that may be given several times.
const LISTS: [&str; 2] = ["copy-dir", "rbd-option"];

/// One more of a list.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Added {
    option: String,
    value: String,
}

/// For the command line.
pub fn parse(text: &str) -> Result<Added, String> {
    match text.strip_prefix("--").unwrap_or(text).split_once('=') {
        Some((option, value)) if LISTS.contains(&option) && !value.is_empty() => {
            Ok(Added { option: option.to_owned(), value: value.to_owned() })
        }
        _ => Err("use copy-dir=DIR or rbd-option=NAME=VALUE; other options are given once, after --".into()),
    }
}

/// The running daemon's arguments with these added. Errors say why that cannot be had, and what can.
pub fn add(mut old: Vec<String>, added: &[Added]) -> Result<Vec<String>, String> {
    for Added { option, .. } in added {
        // The command line's list stands in the place of the file's, of which nothing is known here.
        if values(&old, option).is_empty() && !values(&old, "config").is_empty() {
            return Err(format!(
                "--add {option}: the running daemon has its list from its --config file, if any: add it there, or give all \
                 of them after --"
            ));
        }
    }
    old.extend(added.iter().map(|Added { option, value }| format!("--{option}={value}")));
    Ok(old)
}

/// What the new arguments replace of the old one's lists, in words.
pub fn replaced(old: &[String], new: &[String]) -> Vec<String> {
    let said = |option: &&str| {
        let (old, new) = (values(old, option), values(new, option));
        let lost: Vec<&str> = old.iter().filter(|value| !new.contains(value)).copied().collect();
        (!new.is_empty() && !lost.is_empty())
            .then(|| format!("--{option} {} is given up: --add {option}=VALUE would keep it", lost.join(" and ")))
    };
    LISTS.iter().filter_map(said).collect()
}

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
    fn adding_keeps_a_list_and_replacing_says_what_is_lost() {
        let old = words("--copy-dir /a --copy-dir=/b --cache none --rbd-option x=1");
        let added = [parse("copy-dir=/c").unwrap(), parse("--rbd-option=y=2").unwrap()];
        let all = add(old.clone(), &added).unwrap();
        assert_eq!(values(&all, "copy-dir"), ["/a", "/b", "/c"]);
        assert_eq!(values(&all, "rbd-option"), ["x=1", "y=2"]);
        assert_eq!(replaced(&old, &words("--cache unsafe")), [""; 0]);
        assert_eq!(replaced(&old, &words("--copy-dir /a --copy-dir /b --copy-dir /c")), [""; 0]);
        let said = replaced(&old, &words("--copy-dir=/b")).join("");
        assert!(said.contains("--copy-dir /a is given up") && said.contains("--add copy-dir="), "{said}");
    }

    #[test]
    fn what_cannot_be_added_is_refused() {
        for text in ["cache=none", "copy-dir", "copy-dir=", "/c"] {
            assert!(parse(text).unwrap_err().contains("copy-dir=DIR"), "{text}");
        }
        let from_file = add(words("--config /etc/disk.toml"), &[parse("copy-dir=/c").unwrap()]);
        assert!(from_file.unwrap_err().contains("--config"), "its list would be replaced by the one that is added");
        assert!(add(words("--config d.toml --copy-dir /a"), &[parse("copy-dir=/c").unwrap()]).is_ok());
    }
}

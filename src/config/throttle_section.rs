//! PURE. Changes the limits in the text of a configuration file and leaves the rest as it is.

use crate::engine::throttle::{Limits, Words};

const KEY: &str = "throttle";

/// The text with these limits in the section `[throttle]`, which keeps its comments. The error says why another program must
/// change it.
pub fn with_limits(text: &str, limits: &Limits) -> Result<String, String> {
    let mut values = limits.values(Words::Libvirt);
    let mut lines: Vec<String> = Vec::new();
    // Where the section's header is, and where further values go.
    let (mut header, mut end) = (None, 0);
    let (mut in_section, mut has_comments) = (false, false);
    for line in text.lines() {
        let word = line.trim();
        if word.starts_with('[') {
            in_section = word.trim_start_matches('[').trim_start().starts_with(KEY);
            if in_section {
                header = Some(lines.len());
                end = lines.len() + 1;
            }
        }
        has_comments |= in_section && word.contains('#');
        if !in_section || word.is_empty() || word.starts_with(['#', '[']) {
            let is_value = word.strip_prefix(KEY).is_some_and(|rest| rest.trim_start().starts_with(['=', '.']));
            if !is_value {
                lines.push(line.to_owned());
            }
        } else if let Some(value) = new_value(word, &mut values) {
            lines.push(value);
            end = lines.len();
        }
    }
    let added = values.iter().map(|(name, value)| format!("{name} = {value}"));
    match header {
        Some(at) if limits.values(Words::Libvirt).is_empty() && !has_comments => drop(lines.remove(at)),
        Some(_) => drop(lines.splice(end..end, added.collect::<Vec<_>>())),
        None if values.is_empty() => {}
        None => {
            trim_end(&mut lines);
            lines.extend([String::new(), format!("[{KEY}]")].into_iter().chain(added));
        }
    }
    trim_end(&mut lines);
    let changed: String = lines.iter().flat_map(|line| [line.as_str(), "\n"]).collect();
    let rest = |text: &str| -> Result<toml::Table, String> {
        let mut table: toml::Table = text.parse().map_err(|error| format!("it is not TOML: {error}"))?;
        table.remove(KEY);
        Ok(table)
    };
    match Ok(rest(text)?) == rest(&changed) {
        true => Ok(changed),
        false => Err(format!("its '{KEY}' is written in a way that cannot be changed automatically: edit it")),
    }
}

/// The line with the new value of the limit that a line of the section gives, and its comment. Takes it from `values`. `None`:
/// the limit is lifted.
fn new_value(line: &str, values: &mut Vec<(String, u64)>) -> Option<String> {
    let name = line.split('=').next()?.trim().trim_matches(['"', '\'']);
    let at = values.iter().position(|(known, _)| known == name)?;
    let (name, value) = values.remove(at);
    let comment = line.find('#').map(|at| format!("  {}", &line[at..])).unwrap_or_default();
    Some(format!("{name} = {value}{comment}"))
}

fn trim_end(lines: &mut Vec<String>) {
    while lines.last().is_some_and(|line| line.trim().is_empty()) {
        lines.pop();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_limits_of_a_file_change() {
        let mut limits = Limits::default();
        assert!(limits.set(Words::Libvirt, "total-iops-sec", 500));
        let plain = "# A disk.\nblk-file = \"/a\"  # here\n\n[rbd-option]\nrbd_cache = true\n";
        let with = with_limits(plain, &limits).unwrap();
        assert_eq!(with, format!("{plain}\n[throttle]\ntotal-iops-sec = 500\n"));
        assert!(limits.set(Words::Libvirt, "read-bytes-sec", 7));
        let changed = with_limits(&with, &limits).unwrap();
        assert_eq!(changed, format!("{plain}\n[throttle]\ntotal-iops-sec = 500\nread-bytes-sec = 7\n"));
        assert_eq!(with_limits(&changed, &Limits::default()).unwrap(), plain);
        let first = "[throttle]\nread-iops-sec = 1\n[rbd-option]\nx = 1\n";
        assert_eq!(with_limits(first, &Limits::default()).unwrap(), "[rbd-option]\nx = 1\n");
        for old in
            ["throttle = [\"read-iops-sec=1\"]\n", "throttle.read-iops-sec = 1\n", "throttle={read-iops-sec=1}\n"]
        {
            assert_eq!(
                with_limits(&format!("{old}cache = \"none\"\n"), &Limits::default()).unwrap(),
                "cache = \"none\"\n"
            );
        }
        for text in ["throttle = [\n\"read-iops-sec=1\"]\n", "serial = \"\"\"\n[throttle]\n\"\"\"\n", "x = "] {
            assert!(with_limits(text, &limits).is_err(), "{text}");
        }
    }
    #[test]
    fn comments_of_the_section_stay() {
        let mut limits = Limits::default();
        assert!(limits.set(Words::Libvirt, "total-iops-sec", 500) && limits.set(Words::Libvirt, "read-bytes-sec", 7));
        let old = "[throttle]\n# Gold.\ntotal-iops-sec = 100 # each second\nwrite-bytes-sec = \"5M\"\n\n# Ceph.\n[rbd-option]\nx = 1\n";
        let changed = with_limits(old, &limits).unwrap();
        let rest = "\n# Ceph.\n[rbd-option]\nx = 1\n";
        let new = "[throttle]\n# Gold.\ntotal-iops-sec = 500  # each second\nread-bytes-sec = 7\n";
        assert_eq!(changed, format!("{new}{rest}"));
        assert_eq!(with_limits(old, &Limits::default()).unwrap(), format!("[throttle]\n# Gold.\n{rest}"));
    }
}

//! PURE. Changes the limits in the text of a configuration file and leaves the rest as it is.

use crate::engine::throttle::{Limits, Words};

const KEY: &str = "throttle";

/// The text with these limits, as the section `[throttle]` at its end. The error says why another program must change it.
pub fn with_limits(text: &str, limits: &Limits) -> Result<String, String> {
    let mut lines: Vec<&str> = Vec::new();
    let mut in_section = false;
    for line in text.lines() {
        let word = line.trim();
        if word.starts_with('[') {
            in_section = word.trim_start_matches('[').trim_start().starts_with(KEY);
        }
        let is_value = word.strip_prefix(KEY).is_some_and(|rest| rest.trim_start().starts_with(['=', '.']));
        if !in_section && !is_value {
            lines.push(line);
        }
    }
    while lines.last().is_some_and(|line| line.trim().is_empty()) {
        lines.pop();
    }
    let mut changed: String = lines.iter().flat_map(|line| [*line, "\n"]).collect();
    let values = limits.values(Words::Libvirt);
    if !values.is_empty() {
        changed += &format!("\n[{KEY}]\n");
        values.iter().for_each(|(name, value)| changed += &format!("{name} = {value}\n"));
    }
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
        assert!(limits.change("read-bytes-sec", 7));
        let changed = with_limits(&with, &limits).unwrap();
        assert_eq!(changed, format!("{plain}\n[throttle]\nread-bytes-sec = 7\ntotal-iops-sec = 500\n"));
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
}

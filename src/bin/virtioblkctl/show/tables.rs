//! The pages of `copies` and `stats`.

use std::fmt::Write;

use virtioblkd::disk::{CopyStatus, ExportStatus, RingStatus};
use virtioblkd::internal::base::text::clean;
use virtioblkd::internal::control::protocol::return_types::Stats;

use super::units::{bytes, time};

/// The page of `copies`: two lines for each copy, the newest last.
pub fn copies(copies: &[CopyStatus]) -> String {
    if copies.is_empty() {
        return "no copies\n".to_owned();
    }
    copies.iter().map(copy).collect()
}

/// Two lines for an export.
fn export(copy: &CopyStatus, export: &ExportStatus) -> String {
    let mut text = format!(
        "{:<8}  {:<9}  NBD export {} of {}  {}\n          {} client(s), {} read, {} saved before the guest overwrote it, {}",
        clean(&copy.copy),
        clean(&copy.state),
        clean(&export.name),
        bytes(copy.total_bytes),
        clean(&copy.target),
        export.clients,
        bytes(export.read_bytes),
        bytes(copy.saved_before_write_bytes),
        time((copy.seconds * 1e3) as u64)
    );
    add_state(copy, &mut text);
    text
}

fn copy(copy: &CopyStatus) -> String {
    if let Some(status) = &copy.export {
        return export(copy, status);
    }
    let milliseconds = |seconds: f64| time((seconds * 1e3) as u64);
    let percent = (u128::from(copy.done_bytes) * 100 / u128::from(copy.total_bytes.max(1))) as u64;
    let mut text = format!(
        "{:<8}  {:<9}  {percent:>3} % of {}  {}\n          {} stored, {} saved before the guest overwrote it, {}",
        clean(&copy.copy),
        clean(&copy.state),
        bytes(copy.total_bytes),
        clean(&copy.target),
        bytes(copy.stored_bytes),
        bytes(copy.saved_before_write_bytes),
        milliseconds(copy.seconds)
    );
    add_state(copy, &mut text);
    text
}

/// Adds what copies and exports have in common.
fn add_state(copy: &CopyStatus, text: &mut String) {
    let milliseconds = |seconds: f64| time((seconds * 1e3) as u64);
    // Writing to a String cannot fail.
    if copy.scratch_bytes > 0 {
        let _ = write!(text, ", {} in the scratch file", bytes(copy.scratch_bytes));
    }
    if copy.slowed_seconds >= 1.0 {
        let _ = write!(text, ", the guest's writes waited {} for it", milliseconds(copy.slowed_seconds));
    }
    if copy.ending {
        text.push_str(", STILL WAITS for the target to end");
    }
    if let Some(error) = &copy.error {
        let _ = write!(text, ": {}", clean(error));
    }
    text.push('\n');
}

const COLUMNS: usize = 16;
/// The first columns, up to the syncs, are always shown.
const FIXED: usize = 10;

/// The most characters of a line of `stats`.
const MAX_LINE: usize = 100;

/// The table of `stats`: a row for each queue, and one for their sum. Columns of counts that are all zero are left out, unless
/// `all`. Columns for which a line has no room follow in a second table.
pub fn stats(stats: &Stats, all: bool) -> String {
    let headings = [
        "queue",
        "size",
        "in-flight",
        "blocked",
        "reads",
        "read",
        "writes",
        "written",
        "flushes",
        "syncs",
        "discards",
        "zeroes",
        "errors",
        "unsupp",
        "irqs",
        "polled",
    ];
    let mut rows = vec![headings.map(str::to_owned)];
    rows.extend(stats.rings.iter().map(|ring| row(ring, false)));
    rows.push(row(&stats.total, true));
    let width = |column: usize| rows.iter().map(|row| row[column].len()).max().unwrap_or(0);
    let widths: Vec<usize> = (0..COLUMNS).map(width).collect();
    let is_used = |column: usize| rows[1..].iter().any(|row| !["0", "0 B", ""].contains(&row[column].as_str()));
    let mut tables: Vec<Vec<usize>> = Vec::new();
    for column in (1..COLUMNS).filter(|&column| all || column < FIXED || is_used(column)) {
        let length = |columns: &[usize]| columns.iter().map(|&column| widths[column] + 2).sum::<usize>();
        match tables.last_mut() {
            Some(columns) if length(columns) + widths[column] <= MAX_LINE => columns.push(column),
            // Each table begins with the queue.
            _ => tables.push(vec![0, column]),
        }
    }
    let line = |row: &[String; COLUMNS], columns: &[usize]| {
        let cells: Vec<String> =
            columns.iter().map(|&column| format!("{:>width$}", row[column], width = widths[column])).collect();
        format!("{}\n", cells.join("  ").trim_end())
    };
    let table = |columns: &Vec<usize>| rows.iter().map(|row| line(row, columns)).collect::<String>();
    tables.iter().map(table).collect::<Vec<_>>().join("\n")
}

/// The cells of one ring. The pattern names every figure, so that a new one cannot be forgotten here.
fn row(ring: &RingStatus, is_total: bool) -> [String; COLUMNS] {
    let RingStatus {
        index,
        size,
        in_flight,
        held,
        reads,
        read_bytes,
        writes,
        written_bytes,
        flushes,
        syncs,
        discards,
        write_zeroes,
        errors,
        unsupported,
        interrupts,
        polled,
        // These are on the page of `status`.
        untracked: _,
        stalled: _,
        oldest_stalled_ms: _,
        kept: _,
        limited: _,
    } = ring;
    let of_one_ring = |text: String| if is_total { String::new() } else { text };
    [
        if is_total { "total".to_owned() } else { index.to_string() },
        of_one_ring(size.to_string()),
        in_flight.to_string(),
        of_one_ring(if *held { "yes" } else { "no" }.to_owned()),
        reads.to_string(),
        bytes(*read_bytes),
        writes.to_string(),
        bytes(*written_bytes),
        flushes.to_string(),
        syncs.to_string(),
        discards.to_string(),
        write_zeroes.to_string(),
        errors.to_string(),
        unsupported.to_string(),
        interrupts.to_string(),
        polled.to_string(),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn figures_that_another_daemon_does_not_send_are_zero() {
        let table = stats(&serde_json::from_str(r#"{"rings": [{"index": 3, "reads": 5, "new": 1}]}"#).unwrap(), false);
        let rows: Vec<Vec<&str>> = table.lines().map(|line| line.split_whitespace().collect()).collect();
        assert_eq!(rows[1][..5], ["3", "0", "0", "no", "5"], "{table}");
        assert_eq!(rows[2][0], "total", "{table}");
        assert!(!table.contains("discards"), "{table}");
        let all = stats(&serde_json::from_str(r#"{"rings": []}"#).unwrap(), true);
        assert!(all.contains("discards") && all.contains("polled"), "{all}");
        assert!(all.lines().all(|line| line.len() <= MAX_LINE), "{all}");
    }
}

//! The subcommand `list`: prints the disks of this host.

use serde_json::{Value, json};
use virtioblkd::internal::base::text::clean;
use virtioblkd::internal::control::client::Failure;
use virtioblkd::internal::host::listing::{self, Listed, State};

use crate::chosen::{self, Chosen};
use crate::json_page;

const HEAD: [&str; 7] = ["NAME", "DOMAIN", "TARGET", "MODE", "STATE", "IMAGE", "CONTROL"];

/// Returns the table of disks, or its JSON.
pub(crate) fn run(chosen: &Chosen, json: bool) -> Result<String, Failure> {
    let disks = listing::find(&chosen.directories())
        .map_err(|error| Failure::new("list", format!("cannot list this host's disks: {error}")))?;
    let rows: Vec<(Listed, State)> = disks.iter().cloned().zip(listing::states(&disks)).collect();
    if json {
        let all: Value = rows.iter().map(|(disk, state)| row_json(disk, state)).collect();
        return Ok(json_page(&all));
    }
    if rows.is_empty() {
        return Ok(
            "virtioblkctl finds no disk on this host; use --control-dir DIR to search another directory\n".into()
        );
    }
    Ok(table(&HEAD, &rows.iter().map(|(disk, state)| row(disk, state)).collect::<Vec<_>>()))
}

fn row_json(disk: &Listed, state: &State) -> Value {
    json!({
        "name": disk.name,
        "domain": disk.domain.as_ref().map(|(name, _)| name),
        "target": disk.target,
        "cache-mode": state.text(|disk| &disk.cache_mode),
        "state": state.word,
        "image": state.text(|disk| &disk.image),
        "control": disk.control,
    })
}

fn row(disk: &Listed, state: &State) -> [String; 7] {
    let text = |text: Option<&str>| text.map_or("-".to_owned(), clean);
    [
        clean(&disk.name),
        text(disk.domain.as_ref().map(|(name, _)| name.as_str())),
        text(disk.target.as_deref()),
        text(state.text(|disk| &disk.cache_mode)),
        state.word.to_owned(),
        text(state.text(|disk| &disk.image)),
        disk.control.as_deref().map_or("-".to_owned(), chosen::path),
    ]
}

/// The most characters of a cell. A daemon, which may be an intruder's, says what is in it; no path of a socket is longer.
const MAX_CELL: usize = 160;

/// Returns the cell, cut to [`MAX_CELL`] characters.
fn cut(cell: &str) -> String {
    if cell.chars().count() <= MAX_CELL {
        return cell.to_owned();
    }
    let start: String = cell.chars().take(MAX_CELL - 3).collect();
    format!("{start}...")
}

/// Formats a table whose columns are as wide as their widest cell. A long cell is cut; `--json` prints it whole.
pub(crate) fn table<const N: usize>(head: &[&str; N], rows: &[[String; N]]) -> String {
    let head: [String; N] = head.map(str::to_owned);
    let rows: Vec<[String; N]> = rows.iter().map(|row| std::array::from_fn(|column| cut(&row[column]))).collect();
    let lines = || std::iter::once(&head).chain(&rows);
    let width = |column: usize| lines().map(|line| line[column].chars().count()).max().unwrap_or(0);
    let widths: Vec<usize> = (0..N).map(width).collect();
    let line = |cells: &[String; N]| {
        let padded: Vec<String> = cells.iter().zip(&widths).map(|(cell, width)| format!("{cell:<width$}")).collect();
        format!("{}\n", padded.join("  ").trim_end())
    };
    lines().map(line).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_are_as_wide_as_their_widest_cell() {
        let rows = [["a".to_owned(), "longer".to_owned()], ["wide".to_owned(), "b".to_owned()]];
        assert_eq!(table(&["X", "Y"], &rows), "X     Y\na     longer\nwide  b\n");
    }

    #[test]
    fn a_long_cell_is_cut_and_does_not_widen_its_column_without_limit() {
        let rows = [["a".repeat(1 << 17), "b".to_owned()], ["é".repeat(MAX_CELL), "c".to_owned()]];
        let text = table(&["X", "Y"], &rows);
        let lines: Vec<&str> = text.lines().collect();
        assert_eq!(lines[1], format!("{}...  b", "a".repeat(MAX_CELL - 3)));
        assert_eq!(lines[2], format!("{}  c", "é".repeat(MAX_CELL)));
    }
}

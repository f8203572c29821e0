//! Translates the Markdown of our pages into roff with the macros of man(7): headings, paragraphs, lists, tables, blocks of
//! code, and within a line code, bold and links.

/// The head of a page.
pub(super) fn title(name: &str, section: &str) -> String {
    format!(
        ".ie \\n(.g .ds Aq \\(aq\n.el .ds Aq '\n.TH {} {section} \"{}\" \"{}\" \"virtioblkd manual\"\n",
        escape(name),
        super::date(),
        escape(&super::source())
    )
}

/// A term and its explanation.
pub(super) fn entry(term: &str, text: &str) -> String {
    let paragraphs: Vec<String> = text.split("\n\n").map(|text| line(&text.replace('\n', " "))).collect();
    format!(".TP\n\\fB{}\\fR\n{}\n", escape(term), paragraphs.join("\n.sp\n"))
}

/// Translates a page without its first heading.
pub(super) fn markdown(text: &str) -> String {
    let mut out = String::new();
    let mut paragraph = String::new();
    let mut lines = text.lines().peekable();
    while let Some(source) = lines.next() {
        let is_plain =
            !source.is_empty() && !["#", "```", "- ", "|", "    "].iter().any(|start| source.starts_with(start));
        if is_plain || (source.starts_with("  ") && !paragraph.is_empty()) {
            paragraph += if paragraph.is_empty() { "" } else { " " };
            paragraph += source.trim();
            continue;
        }
        flush(&mut out, &mut paragraph);
        if let Some(heading) = source.strip_prefix("### ") {
            out += &format!(".SS {}\n", line(heading));
        } else if let Some(heading) = source.strip_prefix("## ") {
            out += &format!(".SH {}\n", line(&heading.to_uppercase()));
        } else if source.starts_with("```") {
            out += if follows_heading(&out) { ".RS 4\n.nf\n" } else { ".sp\n.RS 4\n.nf\n" };
            for code in lines.by_ref().take_while(|line| !line.starts_with("```")) {
                out += &format!("{}\n", guard(&escape(code)));
            }
            out += ".fi\n.RE\n";
        } else if let Some(item) = source.strip_prefix("- ") {
            out += ".IP \\(bu 2\n";
            paragraph = item.to_owned();
            // A list's item is a paragraph of its own macro.
            while let Some(more) = lines.next_if(|line| line.starts_with("  ")) {
                paragraph += &format!(" {}", more.trim());
            }
            out += &format!("{}\n", line(&std::mem::take(&mut paragraph)));
        } else if source.starts_with('|') {
            table(&mut out, source);
        }
    }
    flush(&mut out, &mut paragraph);
    out
}

/// After a heading, which the caller may have written, the macros for space have no effect.
fn follows_heading(out: &str) -> bool {
    out.lines().last().is_none_or(|last| last.starts_with(".S"))
}

fn flush(out: &mut String, paragraph: &mut String) {
    if !paragraph.is_empty() {
        *out += if follows_heading(out) { "" } else { ".PP\n" };
        *out += &format!("{}\n", line(paragraph));
        paragraph.clear();
    }
}

/// A row becomes a term and its explanation. The row of dashes below a table's head, and an empty head, become nothing.
fn table(out: &mut String, row: &str) {
    let row = row.replace("\\|", "\u{0}");
    let cells: Vec<String> = row.trim_matches('|').split('|').map(|cell| cell.trim().replace('\u{0}', "|")).collect();
    if cells.iter().all(|cell| cell.chars().all(|c| "-: ".contains(c))) {
        return;
    }
    let rest: Vec<String> = cells[1..].iter().filter(|cell| !cell.is_empty()).map(|cell| line(cell)).collect();
    let rest = if rest.is_empty() { "\\&".to_owned() } else { rest.join("; ") };
    *out += &format!(".TP\n{}\n{}\n", line(&cells[0]), guard(&rest));
}

/// Translates the marks within a line.
fn line(text: &str) -> String {
    let mut out = String::new();
    for (number, part) in text.split('`').enumerate() {
        out += &if number % 2 == 1 { format!("\\fB{}\\fR", escape(part)) } else { marks(part) };
    }
    guard(&out)
}

/// Bold text and links, outside of code.
fn marks(text: &str) -> String {
    let mut out = String::new();
    for (number, part) in text.split("**").enumerate() {
        let part = links(part);
        out += &if number % 2 == 1 { format!("\\fB{part}\\fR") } else { part };
    }
    out
}

/// Of a link to another site the address is shown; of one to another page of ours only the text.
fn links(text: &str) -> String {
    let mut out = String::new();
    let mut rest = text;
    while let Some((before, label, target, after)) = first_link(rest) {
        out += &escape(before);
        out += &escape(label);
        if target.starts_with("http") {
            out += &format!(" ({})", escape(target));
        }
        rest = after;
    }
    out + &escape(rest)
}

fn first_link(text: &str) -> Option<(&str, &str, &str, &str)> {
    let middle = text.find("](")?;
    let start = text[..middle].rfind('[')?;
    let end = middle + text[middle..].find(')')?;
    Some((&text[..start], &text[start + 1..middle], &text[middle + 2..end], &text[end + 1..]))
}

fn escape(text: &str) -> String {
    text.replace('\\', "\\e").replace('-', "\\-").replace('\'', "\\*(Aq").replace('~', "\\(ti").replace('^', "\\(ha")
}

/// A line that begins with a dot or an apostrophe would be a macro.
fn guard(text: &str) -> String {
    if text.starts_with(['.', '\'']) { format!("\\&{text}") } else { text.to_owned() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_kind_of_markdown_has_its_macro() {
        let cases = [
            ("one\ntwo", "one two\n"),
            ("## A\n\none\n\ntwo", ".SH A\none\n.PP\ntwo\n"),
            ("## Exit status", ".SH EXIT STATUS\n"),
            ("### run", ".SS run\n"),
            ("## A\n```\nb\n```", ".SH A\n.RS 4\n.nf\nb\n.fi\n.RE\n"),
            ("- a `b-c`\n  d\n- e", ".IP \\(bu 2\na \\fBb\\-c\\fR d\n.IP \\(bu 2\ne\n"),
            ("```sh\n.x \\n\n```", ".RS 4\n.nf\n\\&.x \\en\n.fi\n.RE\n"),
            ("| a | b |\n|---|---|\n| `1\\|2` | x | y |", ".TP\na\nb\n.TP\n\\fB1|2\\fR\nx; y\n"),
            ("**bold** [page](a.md) [site](https://a.b)", "\\fBbold\\fR page site (https://a.b)\n"),
            (".so /etc/passwd", "\\&.so /etc/passwd\n"),
        ];
        for (text, wanted) in cases {
            assert_eq!(markdown(text), wanted, "{text}");
        }
    }
}

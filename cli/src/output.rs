//! What the commands print: tables for people, JSON for programs.
//!
//! Invariant: a reader that goes away (`chronik topic list | head -1`) is not an error.

use std::io::Write as _;

/// Writes to standard output; a closed pipe is ignored.
pub fn print(text: &str) {
    let mut out = std::io::stdout().lock();
    let _ = out.write_all(text.as_bytes()).and_then(|()| out.flush());
}

pub fn print_line(line: &str) {
    print(&format!("{line}\n"));
}

pub fn print_json(value: &serde_json::Value) {
    // Indented: read by people while they write the program that will read it.
    print_line(&format!("{value:#}"));
}

/// Rows under a header, columns as wide as their widest cell.
pub struct Table {
    rows: Vec<Vec<String>>,
}

impl Table {
    pub fn new(header: &[&str]) -> Self {
        Self {
            rows: vec![header.iter().map(|cell| (*cell).to_owned()).collect()],
        }
    }

    pub fn row(&mut self, cells: Vec<String>) {
        self.rows.push(cells);
    }

    pub fn render(&self) -> String {
        let columns = self.rows.iter().map(Vec::len).max().unwrap_or(0);
        let mut widths = vec![0; columns];
        for row in &self.rows {
            for (width, cell) in widths.iter_mut().zip(row) {
                *width = (*width).max(cell.chars().count());
            }
        }
        let mut text = String::new();
        for row in &self.rows {
            let mut line = String::new();
            for (width, cell) in widths.iter().zip(row) {
                line.push_str(&format!("{cell:<width$}  "));
            }
            text.push_str(line.trim_end());
            text.push('\n');
        }
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_line_up_and_lines_do_not_end_in_blanks() {
        let mut table = Table::new(&["ID", "ADDRESS", "RACK"]);
        table.row(vec!["1".into(), "127.0.0.1:9".into(), "a".into()]);
        table.row(vec!["12345".into(), "x".into(), String::new()]);
        assert_eq!(
            table.render(),
            "ID     ADDRESS      RACK\n1      127.0.0.1:9  a\n12345  x\n"
        );
    }
}

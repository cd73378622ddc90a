//! The reference page of cluster.toml, made from the declarations in `raw`.

use super::raw::SECTIONS;
use super::section::SectionInfo;
use std::fmt::Write;

/// What stands above the sections.
const INTRO: &str = "# cluster.toml

<!-- Written by `helio reference > docs/configuration.md`; a test fails when it is out of date. -->

Every key has a default. A file without `[model]` starts a cluster that runs actors and jobs, and serves what `helio serve`
deploys; an empty `[model]` serves the bundled model with one rank per GPU of this machine, or on four CPU devices where it has none, and so
does no file at all in a directory that has that model. Unknown keys are refused. Relative paths start at the directory of
the file.
`helio check cluster.toml` reads the file and the model without starting anything.
";

/// docs/configuration.md as it should be.
pub(crate) fn reference_page() -> String {
    let mut page = String::from(INTRO);
    for section in &SECTIONS {
        write_section(&mut page, section);
    }
    page
}

fn write_section(page: &mut String, section: &SectionInfo) {
    let heading =
        if section.repeated { format!("[[{}]]", section.title) } else { format!("[{}]", section.title) };
    let defaults = (section.defaults)();
    let _ = write!(
        page,
        "\n## {heading}\n\n{}\n\n| key | takes | default | |\n|---|---|---|---|\n",
        prose(section.about)
    );
    for key in section.keys {
        let default = defaults.get(key.name).map_or_else(String::new, |value| format!("`{value}`"));
        let _ = writeln!(page, "| `{}` | {} | {default} | {} |", key.name, key.kind, prose(key.about));
    }
}

/// Doc lines as one paragraph.
fn prose(lines: &[&str]) -> String {
    lines.iter().map(|line| line.trim()).collect::<Vec<_>>().join(" ")
}

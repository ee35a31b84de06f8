//! Pages for operators, as their readers take them: block by block.

/// What a reader runs at once.
#[derive(Debug)]
pub struct Block {
    /// The heading that it stands below.
    pub section: String,
    /// What it contains: commands, or documents.
    pub commands: String,
}

/// The `sh` blocks of a page.
pub fn blocks(text: &str) -> Vec<Block> {
    blocks_of("sh", text)
}

/// The `yaml` blocks of a page.
pub fn documents(text: &str) -> Vec<String> {
    blocks_of("yaml", text).into_iter().map(|block| block.commands).collect()
}

fn blocks_of(wanted: &str, text: &str) -> Vec<Block> {
    let mut blocks = vec![];
    let mut section = String::new();
    let mut lines = text.lines();
    while let Some(line) = lines.next() {
        if let Some(heading) = line.strip_prefix('#') {
            section = heading.trim_start_matches('#').trim().to_owned();
        } else if let Some(language) = line.strip_prefix("```") {
            let content: Vec<&str> = lines.by_ref().take_while(|line| *line != "```").collect();
            if language == wanted {
                blocks.push(Block { section: section.clone(), commands: content.join("\n") });
            }
        }
    }
    blocks
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_of_a_page_are_those_for_a_shell() {
        let page = "# One\n```sh\na\nb\n```\ntext\n```text\nno\n```\n## Two\n```yaml\n# no heading\n```\n```sh\nc\n```\n";
        let found: Vec<_> = blocks(page).into_iter().map(|it| (it.section, it.commands)).collect();
        let block = |section: &str, commands: &str| (section.to_owned(), commands.to_owned());
        assert_eq!(found, [block("One", "a\nb"), block("Two", "c")]);
        assert_eq!(documents(page), ["# no heading"]);
    }
}

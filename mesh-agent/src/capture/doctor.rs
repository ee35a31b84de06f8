//! Tells whether this kernel can capture, without an agent: `mesh-agent doctor`.

use std::{fs, path::Path};

use super::{features::Features, programs::Kernel};

/// What was found: a table for people, and whether an agent would start here.
#[derive(Debug)]
pub struct Findings {
    /// The table.
    pub table: String,
    /// Nothing indispensable is missing, and the kernel takes the programs.
    pub capable: bool,
}

/// Looks for what capture needs, and has the kernel take the programs, with maps in a directory beside `bpffs` that is
/// removed again; attaches nothing that stays.
pub fn examine(bpffs: &Path) -> Findings {
    let features = Features::probe();
    let scratch = bpffs.with_file_name(format!("nodemesh-doctor-{}", std::process::id()));
    let loaded = Kernel::load_attaching(&scratch, features.attachment()).map(drop);
    // Not there if it could not be made.
    let _ = fs::remove_dir_all(&scratch);
    let verdict = match &loaded {
        Ok(()) => "the kernel takes the programs".to_owned(),
        Err(error) => format!("{error}"),
    };
    Findings {
        table: format!("{features}\n{verdict}\n"),
        capable: features.suffice().is_ok() && loaded.is_ok(),
    }
}

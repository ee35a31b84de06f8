//! `meshctl check`: a directory read as the controller reads it, and looked through for what is suspicious.

use std::{path::Path, process::ExitCode};

use mesh_controller::{
    admin::answer::Checked,
    review::{self, Warning},
    source::files,
};
use mesh_core::model::Mode;

use crate::{Output, print, show};

/// Reads, prints, and says by the exit code whether it is good enough.
pub(crate) fn check(
    output: Output,
    dir: &Path,
    strict: bool,
    default_mode: Mode,
) -> anyhow::Result<ExitCode> {
    let ledger = files::check(dir)?;
    let mut warnings = review::review(&ledger, default_mode);
    locate(&mut warnings);
    let checked = Checked {
        accepted: ledger.documents_accepted(),
        refused: ledger.documents_refused(),
        problems: ledger.refused().to_vec(),
        warnings,
    };
    print(output, &checked, show::checked)?;
    let bad = checked.refused > 0 || strict && !checked.warnings.is_empty();
    Ok(if bad { ExitCode::from(1) } else { ExitCode::SUCCESS })
}

/// Gives each warning its field's line; they come sorted by file.
fn locate(warnings: &mut [Warning]) {
    for of_file in warnings.chunk_by_mut(|a, b| a.file == b.file) {
        let fields: Vec<(usize, &str)> = of_file.iter().map(|it| (it.line, it.field.as_str())).collect();
        let lines = files::lines(&of_file[0].file, &fields);
        for (warning, line) in of_file.iter_mut().zip(lines) {
            warning.line = line;
        }
    }
}

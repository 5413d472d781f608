//! The directory that an adapter is.

use std::fs;
use std::path::Path;

use trainable_tokens_core::{ErrorKind, TokenRows};
use trainable_tokens_format::{Adapter, Error, Overwrite, write_dir_atomically};

use super::{CONFIG_FILE, Files, ROWS_FILE, adapter_of, tree};
use crate::failure::{ensure, equal, refused};
use crate::world::{World, noise};
use crate::{Failure, Harness, Outcome};

fn names(dir: &Path) -> Result<Vec<String>, Failure> {
    let files = tree(dir)?.into_iter();
    Ok(files.map(|(path, _)| path.display().to_string()).collect())
}

/// An adapter is two files of one directory. Without one of them it is not found; rows in a pickle are not opened.
pub fn an_adapter_is_two_files<H: Harness>() -> Outcome {
    let world = World::fixed(7, 3, &[5, 2], &[]);
    let home = tempfile::tempdir()?;
    let dir = home.path().join("adapter");
    let absent = |what: &str| match Adapter::read(&dir) {
        Err(Error::NotFound { .. }) => Ok(()),
        other => Err(Failure::new(format!("{what} gives {other:?}"))),
    };
    absent("no directory")?;
    adapter_of::<H>(&world.trained::<H>()?)?.write(&dir, Overwrite::Refuse)?;
    equal(
        "files",
        &names(&dir)?,
        &[CONFIG_FILE, ROWS_FILE].map(String::from).to_vec(),
    )?;
    let pickle = dir.join("adapter_model.bin");
    fs::write(&pickle, "no pickle")?;
    Adapter::read(&dir)?;
    fs::remove_file(dir.join(ROWS_FILE))?;
    refused("a pickle", Adapter::read(&dir), ErrorKind::Unsupported)?;
    fs::remove_file(&pickle)?;
    absent("no file of rows")?;
    fs::write(dir.join(ROWS_FILE), "")?;
    fs::remove_file(dir.join(CONFIG_FILE))?;
    absent("no config")
}

/// What PEFT wrote gives the same bytes when it is read and written again, both files.
pub fn peft_files_stay_the_same<H: Harness>() -> Outcome {
    macro_rules! written_by_peft {
        ($($name:literal: $shape:expr,)+) => {
            [$((
                include_str!(concat!("../../../peft/", $name, "/adapter_config.json")),
                &include_bytes!(concat!("../../../peft/", $name, "/adapter_model.safetensors"))[..],
                $shape,
            ),)+]
        };
    }
    for (config, rows, shape) in written_by_peft! { "tied": [5, 40], "regex": [2, 6], "half": [5, 8], } {
        let home = tempfile::tempdir()?;
        let files = Files {
            config: config.to_owned(),
            rows: rows.to_vec(),
        };
        let adapter = files.read()??;
        equal("the rows' shape", &adapter.modules()[0].rows().shape(), &shape)?;
        adapter.write_into(home.path())?;
        equal(
            "the config",
            &fs::read_to_string(home.path().join(CONFIG_FILE))?.as_str(),
            &config,
        )?;
        equal("the rows", &fs::read(home.path().join(ROWS_FILE))?, &files.rows)?;
    }
    Ok(())
}

/// A directory appears whole or not at all. One that exists is replaced on request only, and only if it is empty or an
/// adapter or a model.
pub fn a_directory_appears_whole_or_not_at_all<H: Harness>() -> Outcome {
    let adapter = |seed| {
        let rows = noise(seed, H::DTYPE, 2, 3);
        super::plain_adapter(&[5, 2], rows)
    };
    let home = tempfile::tempdir()?;
    let dir = home.path().join("a/b");
    let content = || tree(home.path());

    // A writer that fails half-way leaves nothing, not even the parents.
    let half_way = |inside: &Path| {
        fs::write(inside.join(CONFIG_FILE), "{}").map_err(|error| Failure::new(error.to_string()))?;
        ensure!(!dir.exists(), "the directory appears before it is whole");
        Err::<(), _>(Failure::new("failed on purpose"))
    };
    let failed = write_dir_atomically(&dir, Overwrite::Refuse, half_way);
    equal(
        "the writer's error",
        &failed,
        &Err(Failure::new("failed on purpose")),
    )?;
    equal("entries after a failure", &fs::read_dir(home.path())?.count(), &0)?;

    adapter(1)?.write(&dir, Overwrite::Refuse)?;
    let first = content()?;
    equal("files", &first.len(), &2)?;
    refused(
        "a second adapter",
        adapter(2)?.write(&dir, Overwrite::Refuse),
        ErrorKind::File,
    )?;
    let failed = write_dir_atomically(&dir, Overwrite::Replace, |_| {
        Err::<(), _>(Failure::new("failed again"))
    });
    equal("the writer's error", &failed, &Err(Failure::new("failed again")))?;
    ensure!(content()? == first, "a write that failed changed the directory");

    // What is replaced goes as a whole.
    fs::write(dir.join("note.txt"), "gone")?;
    adapter(2)?.write(&dir, Overwrite::Replace)?;
    let second = content()?;
    equal("files", &second.len(), &2)?;
    ensure!(second != first, "the adapter was not replaced");

    let keep = home.path().join("keep");
    fs::create_dir(&keep)?;
    adapter(3)?.write(&keep, Overwrite::Replace)?;
    fs::remove_file(keep.join(CONFIG_FILE))?;
    fs::write(home.path().join("file"), "")?;
    let before = content()?;
    refused(
        "files of someone else",
        adapter(4)?.write(&keep, Overwrite::Replace),
        ErrorKind::File,
    )?;
    let file = home.path().join("file");
    refused(
        "a file",
        adapter(4)?.write(&file, Overwrite::Replace),
        ErrorKind::File,
    )?;
    ensure!(content()? == before, "a refused write changed something");
    fs::write(keep.join("config.json"), "{}")?;
    adapter(4)?.write(&keep, Overwrite::Replace)?;
    let rows = Adapter::read(&keep)?.rows("emb").cloned();
    equal(
        "the rows",
        &rows.map(|rows: TokenRows| rows.to_le_bytes()),
        &Some(noise(4, H::DTYPE, 2, 3).to_le_bytes()),
    )
}

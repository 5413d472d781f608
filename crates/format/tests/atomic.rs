//! Output appears whole or not at all.
#![allow(clippy::unwrap_used, clippy::panic)]

mod common;

use std::fs;
use std::io::Write as _;
use std::path::Path;

use common::tree;
use trainable_tokens_format::{Error, Overwrite, Result, write_dir_atomically, write_file_atomically};

fn names(dir: &Path) -> Vec<String> {
    let entries = fs::read_dir(dir).unwrap();
    let mut names: Vec<_> = entries
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    names
}

/// An adapter of one file, as far as replacing is concerned.
#[allow(clippy::unnecessary_wraps)]
fn fill(dir: &Path, text: &str) -> Result<()> {
    fs::write(dir.join("adapter_config.json"), text).unwrap();
    fs::create_dir(dir.join("sub")).unwrap();
    fs::write(dir.join("sub/file"), text).unwrap();
    Ok(())
}

fn failing<T>() -> Result<T> {
    Err(trainable_tokens_core::Error::NotMerged.into())
}

#[test]
fn a_directory_appears_with_all_its_files() {
    let home = tempfile::tempdir().unwrap();
    let out = home.path().join("a/b/out/");
    write_dir_atomically(&out, Overwrite::Refuse, |dir| fill(dir, "1")).unwrap();
    assert_eq!(names(home.path().join("a/b").as_path()), ["out"]);
    assert_eq!(fs::read(out.join("sub/file")).unwrap(), b"1");
}

#[test]
fn a_failure_leaves_nothing_behind() {
    let home = tempfile::tempdir().unwrap();
    let failed: Result<()> = write_dir_atomically(home.path().join("a/b/out"), Overwrite::Replace, |dir| {
        fill(dir, "1")?;
        failing()
    });
    assert!(matches!(failed, Err(Error::Core(_))));
    let failed: Result<()> = write_file_atomically(home.path().join("c/out"), Overwrite::Replace, |file| {
        file.write_all(b"1").unwrap();
        failing()
    });
    assert!(matches!(failed, Err(Error::Core(_))));
    assert!(names(home.path()).is_empty());
}

#[test]
fn a_failure_leaves_the_old_as_it_was() {
    let home = tempfile::tempdir().unwrap();
    let out = home.path().join("out");
    write_dir_atomically(&out, Overwrite::Refuse, |dir| fill(dir, "old")).unwrap();
    let before = tree(home.path());
    let failed: Result<()> = write_dir_atomically(&out, Overwrite::Replace, |dir| {
        fill(dir, "new")?;
        failing()
    });
    assert!(failed.is_err());
    let refused = write_dir_atomically(&out, Overwrite::Refuse, |dir| fill(dir, "new"));
    assert!(refused.unwrap_err().to_string().ends_with("out already exists"));
    assert_eq!(tree(home.path()), before);
    write_dir_atomically(&out, Overwrite::Replace, |dir| fill(dir, "new")).unwrap();
    assert_eq!(names(home.path()), ["out"]);
    assert_eq!(fs::read(out.join("sub/file")).unwrap(), b"new");
}

#[test]
fn only_adapters_models_and_empty_directories_are_replaced() {
    let home = tempfile::tempdir().unwrap();
    let out = home.path().join("out");
    fs::create_dir(&out).unwrap();
    write_dir_atomically(&out, Overwrite::Replace, |dir| {
        fs::write(dir.join("thesis.tex"), "x").map_err(|_| trainable_tokens_core::Error::NotMerged.into())
            as Result<()>
    })
    .unwrap();
    let before = tree(home.path());
    let refused = write_dir_atomically(&out, Overwrite::Replace, |dir| fill(dir, "new"));
    assert!(matches!(refused, Err(Error::Target { .. })));
    let refused = write_dir_atomically(out.join("thesis.tex"), Overwrite::Replace, |dir| fill(dir, "new"));
    assert!(matches!(refused, Err(Error::Target { .. })));
    let refused: Result<()> = write_file_atomically(&out, Overwrite::Replace, |_| Ok(()));
    assert!(matches!(refused, Err(Error::Target { .. })));
    for nameless in ["/", "..", "."] {
        let refused = write_dir_atomically(nameless, Overwrite::Replace, |dir| fill(dir, "new"));
        assert!(refused.is_err(), "{nameless}");
    }
    assert_eq!(tree(home.path()), before);
}

#[test]
fn a_file_is_replaced_only_when_asked() {
    let home = tempfile::tempdir().unwrap();
    let out = home.path().join("out");
    let write = |overwrite, text: &str| -> Result<()> {
        write_file_atomically(&out, overwrite, |file| {
            file.write_all(text.as_bytes()).unwrap();
            Ok(())
        })
    };
    write(Overwrite::Refuse, "1").unwrap();
    assert!(matches!(write(Overwrite::Refuse, "2"), Err(Error::Exists { .. })));
    assert_eq!(fs::read(&out).unwrap(), b"1");
    write(Overwrite::Replace, "3").unwrap();
    assert_eq!(fs::read(&out).unwrap(), b"3");
    assert_eq!(names(home.path()), ["out"]);
}

#[cfg(unix)]
#[test]
fn what_a_symbolic_link_points_to_is_replaced() {
    let home = tempfile::tempdir().unwrap();
    let (real, link) = (home.path().join("real"), home.path().join("link"));
    write_dir_atomically(&real, Overwrite::Refuse, |dir| fill(dir, "old")).unwrap();
    std::os::unix::fs::symlink(&real, &link).unwrap();
    for text in ["new", "newer"] {
        let link = home.path().join(if text == "new" { "link" } else { "link/" });
        write_dir_atomically(&link, Overwrite::Replace, |dir| fill(dir, text)).unwrap();
        assert_eq!(fs::read(real.join("sub/file")).unwrap(), text.as_bytes());
    }
    assert!(link.is_symlink());
    assert_eq!(names(home.path()), ["link", "real"]);
    let dangling = home.path().join("dangling");
    std::os::unix::fs::symlink(home.path().join("nothing"), &dangling).unwrap();
    assert!(write_dir_atomically(&dangling, Overwrite::Replace, |dir| fill(dir, "x")).is_err());
}

#[cfg(unix)]
#[test]
fn modes_are_those_of_ordinary_files() {
    use std::os::unix::fs::PermissionsExt as _;
    let home = tempfile::tempdir().unwrap();
    let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode();
    fs::write(home.path().join("plain"), "").unwrap();
    fs::create_dir(home.path().join("plain_dir")).unwrap();
    let written: Result<()> = write_file_atomically(home.path().join("file"), Overwrite::Refuse, |_| Ok(()));
    written.unwrap();
    write_dir_atomically(home.path().join("dir"), Overwrite::Refuse, |dir| fill(dir, "")).unwrap();
    assert_eq!(mode(&home.path().join("file")), mode(&home.path().join("plain")));
    assert_eq!(
        mode(&home.path().join("dir")),
        mode(&home.path().join("plain_dir"))
    );
}

/// At every moment there is one of the two, whole: whoever kills the process finds it.
#[cfg(any(target_os = "linux", target_os = "android", target_vendor = "apple"))]
#[test]
fn a_replaced_directory_is_never_missing() {
    use std::sync::atomic::{AtomicBool, Ordering};

    let home = tempfile::tempdir().unwrap();
    let out = home.path().join("out");
    write_dir_atomically(&out, Overwrite::Refuse, |dir| fill(dir, "0")).unwrap();
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let reader = scope.spawn(|| {
            let (mut looks, mut missing) = (0u32, 0u32);
            while !done.load(Ordering::Relaxed) {
                looks += 1;
                missing += u32::from(!out.join("adapter_config.json").exists());
            }
            (looks, missing)
        });
        for round in 0..300 {
            write_dir_atomically(&out, Overwrite::Replace, |dir| fill(dir, &round.to_string())).unwrap();
        }
        done.store(true, Ordering::Relaxed);
        let (looks, missing) = reader.join().unwrap();
        assert!(looks > 300, "{looks}");
        assert_eq!(missing, 0, "of {looks}");
    });
    assert_eq!(names(home.path()), ["out"]);
}

//! `model.safetensors.index.json` and its shards.

use trainable_tokens_format::{Checkpoint, SafetensorsFile};

use crate::check_message;
use crate::checkpoint::check_tensors;
use crate::input::{Mode, split_file};

/// The input is a mode, an index and two shards, each but the last after its length in four bytes.
///
/// Every tensor of the index is found in the shard that it names, and no file outside the directory is asked for.
pub fn index(input: &[u8]) {
    let Some((mode, rest)) = Mode::split(input) else {
        return;
    };
    let (index, rest) = split_file(rest);
    let (first, second) = split_file(rest);
    let mut asked = 0;
    let checkpoint = Checkpoint::from_parts("base", index.to_vec(), |path| {
        assert_eq!(path.parent().and_then(|dir| dir.to_str()), Some("base"));
        asked += 1;
        let bytes = if asked == 1 { first } else { second };
        SafetensorsFile::from_bytes(path, mode.file(bytes))
    });
    let checkpoint = match checkpoint {
        Ok(checkpoint) => checkpoint,
        Err(error) => return check_message(&error.to_string()),
    };
    assert_eq!(checkpoint.files().len(), asked);
    for name in checkpoint.names() {
        let tensor = checkpoint.tensor(name).expect("a name of the index");
        let shard = checkpoint.shard_of(name).expect("a name of the index");
        assert_eq!((tensor.name, tensor.file), (name, shard));
        let missing = format!("x.{name}");
        match checkpoint.table(&missing) {
            Ok(table) => assert_eq!(table.name(), missing),
            Err(error) => check_message(&error.to_string()),
        }
    }
    checkpoint.files().iter().for_each(check_tensors);
}

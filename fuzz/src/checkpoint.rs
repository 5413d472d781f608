//! One safetensors file: its header, its tensors as tables and rows, and a training state.

use trainable_tokens_core::{EmbeddingSource, HostTable, TokenId};
use trainable_tokens_format::{MappedTable, SafetensorsFile, TensorRef, TrainingState, digest};

use crate::check_message;
use crate::input::Mode;

/// The input is a mode and a file.
///
/// Every tensor is looked at in every way: as bytes, rows and a table, which digests to the same as its rows. A
/// training state is written and read again to the same bits.
pub fn checkpoint(input: &[u8]) {
    let Some((mode, rest)) = Mode::split(input) else {
        return;
    };
    match SafetensorsFile::from_bytes("model.safetensors", mode.file(rest)) {
        Ok(file) => {
            check_tensors(&file);
            check_state(&file);
        }
        Err(error) => check_message(&error.to_string()),
    }
}

/// Every name of the file leads to a tensor and, perhaps, to a table.
pub(crate) fn check_tensors(file: &SafetensorsFile) {
    for name in file.names() {
        assert!(file.contains(name));
        let tensor = file.tensor(name).expect("a name of the file");
        match tensor.to_rows() {
            Ok(rows) => assert_eq!(rows.to_le_bytes(), tensor.bytes),
            Err(error) => check_message(&error.to_string()),
        }
        match file.table(name) {
            Ok(table) => check_table(&table, tensor),
            Err(error) => check_message(&error.to_string()),
        }
    }
    if let Err(error) = file.table("no such name") {
        check_message(&error.to_string());
    }
}

fn check_table(table: &MappedTable, tensor: TensorRef<'_>) {
    let shape = [table.vocab_size(), table.embedding_dim()];
    assert_eq!((table.bytes(), &shape[..]), (tensor.bytes, tensor.shape));
    assert_eq!(digest(table).expect("every row is there"), table.digest());
    let count = u32::try_from(table.vocab_size()).expect("ids have 32 bits");
    for id in [0, count / 2, count.saturating_sub(1), count, u32::MAX] {
        let row = table.row(TokenId(id));
        let read = table.read_rows(&[TokenId(id)]);
        assert_eq!((row.is_some(), read.is_ok()), (id < count, id < count));
        if let Err(error) = read {
            check_message(&error.to_string());
        }
    }
}

fn check_state(file: &SafetensorsFile) {
    let state = match TrainingState::from_file(file) {
        Ok(state) => state,
        Err(error) => return check_message(&error.to_string()),
    };
    let bytes = state.to_bytes().expect("what was read is written");
    let again = SafetensorsFile::from_bytes(TrainingState::FILE_NAME, bytes.clone());
    let again = again.and_then(|file| TrainingState::from_file(&file));
    let again = again.expect("what was written is a training state");
    assert_eq!(
        (state.optimizer.step, &state.extra),
        (again.optimizer.step, &again.extra)
    );
    assert_eq!(bytes, again.to_bytes().expect("what was read is written"));
}

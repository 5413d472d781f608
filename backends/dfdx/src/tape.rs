//! Tapes of dfdx's.

use dfdx::tensor::{NoneTape, OwnedTape, Storage, Tape};

/// A tape that can stand in for an [`OwnedTape`]: that itself, and [`NoneTape`] for inference.
pub trait DfdxTape<E, D: Storage<E>>: Tape<E, D> {
    /// The tape, or an empty one.
    fn into_owned(self) -> OwnedTape<E, D>;
    /// The tape again, or nothing of it.
    fn from_owned(tape: OwnedTape<E, D>) -> Self;
}

impl<E, D: Storage<E>> DfdxTape<E, D> for OwnedTape<E, D> {
    fn into_owned(self) -> OwnedTape<E, D> {
        self
    }

    fn from_owned(tape: OwnedTape<E, D>) -> Self {
        tape
    }
}

impl<E, D: Storage<E>> DfdxTape<E, D> for NoneTape {
    fn into_owned(self) -> OwnedTape<E, D> {
        OwnedTape::default()
    }

    fn from_owned(_: OwnedTape<E, D>) -> Self {
        Self
    }
}

//! `demo`: the whole path, on the small model inside this program.

use anyhow::Result;

use crate::args::{Cli, DemoArgs};

pub(super) fn run(_args: &DemoArgs, _cli: &Cli) -> Result<()> {
    Ok(())
}

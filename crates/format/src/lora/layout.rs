//! Which way round a model stores its linear weights.

use std::borrow::Cow;

use super::{LoraLayer, LoraWeights};
use crate::checkpoint::Checkpoint;
use crate::error::Result;

/// How a linear weight lies in the checkpoint.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Layout {
    /// `[out, in]`, as torch's `Linear`.
    OutIn,
    /// `[in, out]`, as the `Conv1D` of GPT-2; PEFT's `fan_in_fan_out`.
    InOut,
}

/// Linear weights whose shape tells how they lie.
///
/// PEFT knows the layout from the layer's class and corrects `fan_in_fan_out` by it, so the field holds what the *last*
/// module was. A checkpoint has no classes; the shape tells all but square weights, and those lie like their neighbours.
pub(super) struct Layouts<'a> {
    known: Vec<(Cow<'a, str>, Layout)>,
}

impl<'a> Layouts<'a> {
    /// Collects what is known: of layers with LoRA's weights, and of layers whose bias tells how many outputs there are.
    pub(super) fn of(base: &'a Checkpoint, weights: &'a [LoraWeights]) -> Result<Self> {
        let mut known = Vec::new();
        for lora in weights.iter().filter(|lora| lora.layer() == LoraLayer::Linear) {
            let name = format!("{}.weight", lora.path());
            if base.contains(&name)
                && let [rows, columns] = *base.tensor(&name)?.shape
                && let Some(layout) = of_shape([rows, columns], [lora.out_features(), lora.in_features()])
            {
                known.push((lora.path().into(), layout));
            }
        }
        for name in base.names() {
            let Some(path) = name.strip_suffix(".bias") else {
                continue;
            };
            let weight = format!("{path}.weight");
            if base.contains(&weight)
                && let [outputs] = *base.tensor(name)?.shape
                && let [rows, columns] = *base.tensor(&weight)?.shape
                && rows != columns
            {
                let path = base.module_name(path);
                match outputs {
                    _ if outputs == rows => known.push((path, Layout::OutIn)),
                    _ if outputs == columns => known.push((path, Layout::InOut)),
                    _ => {}
                }
            }
        }
        Ok(Self { known })
    }

    /// How the square weight of `lora` lies: like the nearest weights that are known if they agree, else as the config says.
    pub(super) fn of_square(&self, lora: &LoraWeights) -> Layout {
        let config = if lora.fan_in_fan_out {
            Layout::InOut
        } else {
            Layout::OutIn
        };
        let near = |path: &str| shared_parts(path, lora.path());
        let nearest = self.known.iter().map(|(path, _)| near(path)).max().unwrap_or(0);
        let mut neighbours = self
            .known
            .iter()
            .filter(|(path, _)| near(path) == nearest && nearest > 0);
        match neighbours.next() {
            Some((_, layout)) if neighbours.all(|(_, other)| other == layout) => *layout,
            _ => config,
        }
    }
}

/// What the shape of a weight tells; nothing if it is square or does not fit at all.
pub(super) fn of_shape(weight: [usize; 2], out_in: [usize; 2]) -> Option<Layout> {
    let [outputs, inputs] = out_in;
    match weight {
        _ if outputs == inputs => None,
        _ if weight == out_in => Some(Layout::OutIn),
        _ if weight == [inputs, outputs] => Some(Layout::InOut),
        _ => None,
    }
}

/// How many parts of their paths two modules share from the start.
fn shared_parts(a: &str, b: &str) -> usize {
    a.split('.').zip(b.split('.')).take_while(|(a, b)| a == b).count()
}

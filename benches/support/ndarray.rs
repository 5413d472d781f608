//! ndarray: explicit passes, into fresh buffers or into those of the step before.

use ::ndarray::{Array2, Axis, OwnedRepr};
use trainable_tokens::ndarray::{NdGradient, NdTable, TrainableTokens, TrainableTokensExt};
use trainable_tokens::{Adam, AdamConfig, Element, EmbeddingSource, LookupPlan};

use super::{Case, Laps, Workload};

type Layer<T> = TrainableTokens<NdTable<OwnedRepr<T>>, T>;

/// What both ways of training have.
struct Common<T: Element> {
    layer: Layer<T>,
    optimizer: Adam,
    ids: Vec<u32>,
    indices: Vec<usize>,
    upstream: Array2<T>,
}

impl<T: Element> Common<T> {
    fn table(workload: Workload) -> Array2<T> {
        Array2::from_shape_vec((workload.vocab_size, workload.dim), workload.table()).unwrap()
    }

    fn upstream(workload: Workload) -> Array2<T> {
        Array2::from_shape_vec((workload.tokens, workload.dim), workload.upstream()).unwrap()
    }

    fn new(workload: Workload, table: Array2<T>, upstream: Array2<T>) -> Self {
        Self {
            layer: TrainableTokens::new(NdTable::new(table).unwrap(), workload.token_set()).unwrap(),
            optimizer: Adam::new(AdamConfig::ADAMW).unwrap(),
            ids: workload.batch(),
            indices: workload.indices(),
            upstream,
        }
    }
}

/// Makes the table; the function makes the layer.
pub(crate) fn fresh<T: Element>(workload: Workload, _: T) -> impl FnOnce() -> Fresh<T> {
    let (table, upstream) = (Common::<T>::table(workload), Common::upstream(workload));
    move || Fresh(Common::new(workload, table, upstream))
}

pub(crate) struct Fresh<T: Element>(Common<T>);

impl<T: Element> Case for Fresh<T> {
    type Rows = Array2<T>;

    fn frozen(&mut self) -> Array2<T> {
        let Common { layer, indices, .. } = &self.0;
        layer.source().view().select(Axis(0), indices)
    }

    fn lookup(&mut self) -> Array2<T> {
        self.0.layer.lookup(&self.0.ids).unwrap()
    }

    fn step(&mut self, laps: &mut Laps) -> Array2<T> {
        let Common {
            layer,
            optimizer,
            ids,
            upstream,
            ..
        } = &mut self.0;
        let plan = layer.plan(ids).unwrap();
        let rows = layer.lookup_planned(&plan).unwrap();
        laps.lap();
        let gradients = layer.backward(&plan, upstream.view()).unwrap();
        laps.lap();
        layer.step(&gradients, optimizer, &mut []).unwrap();
        laps.lap();
        rows
    }
}

/// As [`fresh`].
pub(crate) fn reused<T: Element>(workload: Workload, _: T) -> impl FnOnce() -> Reused<T> {
    let (table, upstream) = (Common::<T>::table(workload), Common::upstream(workload));
    move || {
        let common = Common::new(workload, table, upstream);
        let plan = common.layer.plan(&common.ids).unwrap();
        Reused {
            rows: Array2::from_elem((workload.tokens, workload.dim), T::default()),
            gradients: common.layer.zero_gradient(),
            plan,
            common,
        }
    }
}

pub(crate) struct Reused<T: Element> {
    common: Common<T>,
    plan: LookupPlan,
    rows: Array2<T>,
    gradients: NdGradient,
}

impl<T: Element> Case for Reused<T> {
    type Rows = ();

    /// A copy of the rows, one after the other.
    fn frozen(&mut self) {
        let table = self.common.layer.source();
        let dim = table.embedding_dim();
        let table = table.view();
        let table = table.as_slice().unwrap();
        let rows = self.rows.as_slice_mut().unwrap();
        for (row, at) in rows.chunks_exact_mut(dim).zip(&self.common.indices) {
            row.copy_from_slice(&table[at * dim..][..dim]);
        }
    }

    fn lookup(&mut self) {
        let Common { layer, ids, .. } = &self.common;
        self.plan.rebuild(layer.tokens(), layer.options(), ids).unwrap();
        layer.lookup_into(&self.plan, self.rows.view_mut()).unwrap();
    }

    fn step(&mut self, laps: &mut Laps) {
        self.lookup();
        laps.lap();
        let Self {
            common,
            plan,
            gradients,
            ..
        } = self;
        let Common { layer, optimizer, .. } = common;
        gradients.zero();
        layer
            .backward_into(plan, common.upstream.view(), gradients)
            .unwrap();
        laps.lap();
        layer.step(gradients, optimizer, &mut []).unwrap();
        laps.lap();
    }
}

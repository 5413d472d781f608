//! The backend over nested vectors, of which a fault may get any part wrong.

use std::cell::{Cell, Ref, RefCell};
use std::marker::PhantomData;
use std::ops::Range;

use half::f16;
use trainable_tokens_core::{
    Backend, CrossEntropyPlan, DType, DeltaStore, Element, EmbeddingSource, LookupPlan, MixedPart, RowMix,
    RowTransform, TokenId, TokenRows, TokenSet, WriteRows,
};
use trainable_tokens_nested_vec::{Error, Gradients, Matrix, NestedVec, Result, VecRows, VecTable};
use trainable_tokens_testkit::{Harness, Layer, Pass, PassGradients};

/// What an update does with the rows.
pub(crate) type Change<'a> = dyn FnMut(&mut TokenRows) -> trainable_tokens_core::Result<()> + 'a;

/// One fault: whatever is not said otherwise is done right.
pub(crate) trait Fault<T: Faulty = f32>: Sync {
    fn read_rows(&self, table: &Table<T>, ids: &[TokenId]) -> Result<TokenRows> {
        table.now().read_rows(ids)
    }

    fn write_rows(&self, table: &Table<T>, ids: &[TokenId], rows: &TokenRows) -> Result<()> {
        table.now.borrow_mut().write_rows(ids, rows)
    }

    fn delta(&self, table: &Table<T>, rows: &TokenRows) -> Result<VecRows> {
        NestedVec::delta(&table.now(), rows)
    }

    fn read(&self, rows: &Rows<T>) -> Result<TokenRows> {
        rows.now.read()
    }

    fn write(&self, rows: &mut Rows<T>, new: &TokenRows) -> Result<()> {
        rows.now.write(new)
    }

    fn update(&self, rows: &mut Rows<T>, change: &mut Change<'_>) -> Result<()> {
        rows.now.update(change)
    }

    fn lookup(
        &self,
        table: &Table<T>,
        delta: Option<&Rows<T>>,
        plan: &LookupPlan,
        transform: RowTransform,
    ) -> Result<Matrix<T>> {
        NestedVec::lookup(&table.now(), delta.map(|delta| &delta.now), plan, transform)
    }

    fn logits(
        &self,
        hidden: Matrix<T>,
        table: &Table<T>,
        delta: Option<&Rows<T>>,
        tokens: &TokenSet,
    ) -> Result<Matrix<T>> {
        NestedVec::logits(hidden, &table.now(), delta.map(|delta| &delta.now), tokens)
    }

    fn lookup_backward(
        &self,
        layer: &Layer<Broken<T>>,
        plan: &LookupPlan,
        upstream: &Matrix<T>,
        gradients: &mut Gradients,
    ) -> Result<()> {
        let rows = layer.rows_for(plan)?;
        let delta = rows.as_deref().map(|delta| &delta.now);
        gradients.add_lookup(delta, plan, upstream, layer.transform().scale)
    }

    fn head_backward(
        &self,
        layer: &Layer<Broken<T>>,
        hidden: &Matrix<T>,
        upstream: &Matrix<T>,
        gradients: &mut Gradients,
    ) -> Result<Matrix<T>> {
        let (table, rows) = (layer.source().now(), layer.active()?);
        let delta = rows.as_deref().map(|delta| &delta.now);
        gradients.add_head(&table, delta, layer.tokens(), hidden, upstream)
    }

    fn loss(
        &self,
        hidden: Matrix<T>,
        table: &Table<T>,
        delta: Option<&Rows<T>>,
        tokens: &TokenSet,
        plan: &CrossEntropyPlan,
    ) -> Result<Matrix<T>> {
        let delta = delta.map(|delta| &delta.now);
        NestedVec::linear_cross_entropy(hidden, &table.now(), delta, tokens, plan)
    }

    fn loss_backward(
        &self,
        layer: &Layer<Broken<T>>,
        hidden: &Matrix<T>,
        plan: &CrossEntropyPlan,
        upstream: f64,
        gradients: &mut Gradients,
    ) -> Result<Matrix<T>> {
        let (table, rows) = (layer.source().now(), layer.active()?);
        let delta = rows.as_deref().map(|delta| &delta.now);
        gradients.add_loss(&table, delta, layer.tokens(), hidden, plan, upstream)
    }

    fn combine(&self, deltas: &[&Rows<T>], mix: &RowMix) -> Result<VecRows> {
        let deltas: Vec<_> = deltas.iter().map(|delta| &delta.now).collect();
        NestedVec::<T>::combine(&deltas, mix)
    }

    fn split_rows(&self, tensor: Matrix<T>, parts: &[Range<usize>]) -> Result<Vec<Matrix<T>>> {
        NestedVec::split_rows(tensor, parts)
    }

    fn join_rows(&self, parts: Vec<Matrix<T>>) -> Result<Matrix<T>> {
        NestedVec::join_rows(parts)
    }

    fn mixed_head_backward(
        &self,
        layer: &Layer<Broken<T>>,
        parts: &[MixedPart<'_, Broken<T>>],
        [hidden, upstream]: [&Matrix<T>; 2],
        gradients: &mut Gradients,
    ) -> Result<Matrix<T>> {
        gradients.add_mixed_head(&layer.source().now(), parts, hidden, upstream)
    }
}

/// An element type whose tables may have a fault, another one in each thread: one harness serves all faults, for
/// every harness compiles the whole kit anew.
pub(crate) trait Faulty: Element {
    /// Gives this thread's tables a fault.
    fn set(fault: &'static dyn Fault<Self>);
    /// The fault of this thread's tables.
    fn fault() -> &'static dyn Fault<Self>;
}

/// No fault.
pub(crate) struct Sound;

macro_rules! faulty {
    ($($ty:ty: $current:ident;)+) => { $(
        thread_local! {
            static $current: Cell<&'static dyn Fault<$ty>> = const { Cell::new(&Sound) };
        }

        impl Faulty for $ty {
            fn set(fault: &'static dyn Fault<Self>) {
                $current.set(fault);
            }
            fn fault() -> &'static dyn Fault<Self> {
                $current.get()
            }
        }

        impl Fault<$ty> for Sound {}
    )+ };
}

faulty! {
    f32: OF_SINGLE;
    f16: OF_HALF;
}

/// A table, and what it was when it was made.
pub(crate) struct Table<T> {
    pub(crate) now: RefCell<VecTable<T>>,
    pub(crate) first: VecTable<T>,
}

impl<T> Table<T> {
    pub(crate) fn now(&self) -> Ref<'_, VecTable<T>> {
        self.now.borrow()
    }
}

impl<T: Faulty> EmbeddingSource for Table<T> {
    type Error = Error;

    fn vocab_size(&self) -> usize {
        self.first.vocab_size()
    }
    fn embedding_dim(&self) -> usize {
        self.first.embedding_dim()
    }
    fn dtype(&self) -> DType {
        T::DTYPE
    }
    fn read_rows(&self, ids: &[TokenId]) -> Result<TokenRows> {
        T::fault().read_rows(self, ids)
    }
}

impl<T: Faulty> WriteRows for Table<T> {
    fn write_rows(&mut self, ids: &[TokenId], rows: &TokenRows) -> Result<()> {
        T::fault().write_rows(self, ids, rows)
    }
}

/// Trained rows, and what they were when they were made.
pub(crate) struct Rows<T> {
    pub(crate) now: VecRows,
    pub(crate) first: VecRows,
    table: PhantomData<T>,
}

impl<T: Faulty> DeltaStore for Rows<T> {
    type Error = Error;

    fn num_rows(&self) -> usize {
        self.now.num_rows()
    }
    fn embedding_dim(&self) -> usize {
        self.now.embedding_dim()
    }
    fn dtype(&self) -> DType {
        self.now.dtype()
    }
    fn read(&self) -> Result<TokenRows> {
        T::fault().read(self)
    }
    fn write(&mut self, rows: &TokenRows) -> Result<()> {
        T::fault().write(self, rows)
    }
    fn update(&mut self, change: &mut Change<'_>) -> Result<()> {
        T::fault().update(self, change)
    }
}

impl<T> AsRef<VecRows> for Rows<T> {
    fn as_ref(&self) -> &VecRows {
        &self.now
    }
}

/// The backend and its harness.
pub(crate) struct Broken<T = f32>(PhantomData<T>);

impl<T: Faulty> Backend for Broken<T> {
    type Error = Error;
    type Source = Table<T>;
    type Delta = Rows<T>;
    type Tensor = Matrix<T>;
    type Gradients = Gradients;

    fn delta(table: &Table<T>, rows: &TokenRows) -> Result<Rows<T>> {
        let now = T::fault().delta(table, rows)?;
        let (first, table) = (now.clone(), PhantomData);
        Ok(Rows { now, first, table })
    }

    fn lookup(
        table: &Table<T>,
        delta: Option<&Rows<T>>,
        plan: &LookupPlan,
        transform: RowTransform,
    ) -> Result<Matrix<T>> {
        T::fault().lookup(table, delta, plan, transform)
    }

    fn logits(
        hidden: Matrix<T>,
        table: &Table<T>,
        delta: Option<&Rows<T>>,
        tokens: &TokenSet,
    ) -> Result<Matrix<T>> {
        T::fault().logits(hidden, table, delta, tokens)
    }

    fn linear_cross_entropy(
        hidden: Matrix<T>,
        table: &Table<T>,
        delta: Option<&Rows<T>>,
        tokens: &TokenSet,
        plan: &CrossEntropyPlan,
    ) -> Result<Matrix<T>> {
        T::fault().loss(hidden, table, delta, tokens, plan)
    }

    fn combine(deltas: &[&Rows<T>], mix: &RowMix) -> Result<Rows<T>> {
        let now = T::fault().combine(deltas, mix)?;
        let (first, table) = (now.clone(), PhantomData);
        Ok(Rows { now, first, table })
    }

    fn num_rows(tensor: &Matrix<T>) -> usize {
        tensor.num_rows()
    }

    fn split_rows(tensor: Matrix<T>, parts: &[Range<usize>]) -> Result<Vec<Matrix<T>>> {
        T::fault().split_rows(tensor, parts)
    }

    fn join_rows(parts: Vec<Matrix<T>>) -> Result<Matrix<T>> {
        T::fault().join_rows(parts)
    }

    fn gradient(gradients: &Gradients, delta: &Rows<T>) -> Result<Option<TokenRows>> {
        NestedVec::<T>::gradient(gradients, &delta.now)
    }
}

impl<T: Faulty> Harness for Broken<T> {
    type Backend = Self;
    const DTYPE: DType = T::DTYPE;

    fn source(rows: &TokenRows) -> Result<Table<T>> {
        let first = VecTable::new(Matrix::from_token_rows(rows));
        let now = RefCell::new(first.clone());
        Ok(Table { now, first })
    }

    fn hidden(_: &Layer<Self>, values: &TokenRows) -> Result<Matrix<T>> {
        Ok(Matrix::from_token_rows(values))
    }

    fn read(values: &Matrix<T>) -> Result<TokenRows> {
        values.to_token_rows()
    }

    fn backward(layer: &Layer<Self>, pass: &Pass) -> Result<PassGradients<Self>> {
        let mut gradients = Gradients::default();
        for (plan, upstream) in &pass.lookups {
            let upstream = Matrix::from_token_rows(upstream);
            T::fault().lookup_backward(layer, plan, &upstream, &mut gradients)?;
        }
        let heads = pass.heads.iter().map(|head| {
            let [hidden, upstream] = [&head.hidden, &head.upstream].map(Matrix::from_token_rows);
            let fault = T::fault();
            let hidden = match head.adapters() {
                None => fault.head_backward(layer, &hidden, &upstream, &mut gradients)?,
                Some(adapters) => {
                    let parts = layer.mixed_parts(hidden.num_rows(), &adapters)?;
                    fault.mixed_head_backward(layer, &parts, [&hidden, &upstream], &mut gradients)?
                }
            };
            hidden.to_token_rows()
        });
        let mut hidden = heads.collect::<Result<Vec<_>>>()?;
        for loss in &pass.losses {
            let plan = CrossEntropyPlan::new(&loss.labels, layer.source().vocab_size(), loss.options)?;
            let states = Matrix::from_token_rows(&loss.hidden);
            let fault = T::fault();
            let gradient = fault.loss_backward(layer, &states, &plan, loss.upstream, &mut gradients)?;
            hidden.push(gradient.to_token_rows()?);
        }
        Ok(PassGradients { gradients, hidden })
    }
}

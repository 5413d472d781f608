//! The model: the table, the adapters' rows and the tables that merges overwrote.

use trainable_tokens_core::{DType, Element, ErrorKind, MergeCheck, Overlap, TokenRows};

use super::call::{Call, RATE, distinct};
use crate::Failure;
use crate::cases::several::team::{Member, in_effect};
use crate::world::select;

pub(super) struct Model {
    pub(super) table: TokenRows,
    pub(super) adapters: Vec<Member>,
    pub(super) active: Vec<&'static str>,
    pub(super) overlap: Overlap,
    pub(super) enabled: bool,
    /// The names of each merge, and the whole table before it.
    pub(super) merges: Vec<(Vec<&'static str>, TokenRows)>,
}

impl Model {
    pub(super) fn new(table: TokenRows) -> Self {
        Self {
            table,
            adapters: Vec::new(),
            active: Vec::new(),
            overlap: Overlap::Refuse,
            enabled: true,
            merges: Vec::new(),
        }
    }

    fn find(&self, name: &str) -> Option<&Member> {
        self.adapters.iter().find(|member| member.name == name)
    }

    pub(super) fn is_merged(&self, name: &str) -> bool {
        self.merges.iter().any(|(names, _)| names.contains(&name))
    }

    /// Adapters by name, those that there are.
    fn members(&self, names: &[&str]) -> Vec<Member> {
        names.iter().filter_map(|name| self.find(name).cloned()).collect()
    }

    /// The table that outputs are made of (SPEC.md A4, A9, A11).
    pub(super) fn dense(&self) -> Result<TokenRows, Failure> {
        if !self.enabled {
            return Ok(self.table.clone());
        }
        let kept = |name: &&str| !self.is_merged(name);
        let names: Vec<_> = self.active.iter().copied().filter(kept).collect();
        let overlap = match &self.overlap {
            Overlap::WeightedMean(weights) => {
                let pairs = self.active.iter().zip(weights).filter(|(name, _)| kept(name));
                Overlap::WeightedMean(pairs.map(|(_, weight)| *weight).collect())
            }
            other => other.clone(),
        };
        in_effect(&self.table, &self.members(&names), &overlap)
    }

    /// The kinds of error that the call deserves; none if it is fine. Which of several comes is open.
    pub(super) fn refusals(&self, call: &Call) -> Vec<ErrorKind> {
        let mut refusals = Vec::new();
        let mut refuse = |if_so: bool, kind| refusals.extend(if_so.then_some(kind));
        let merged = !self.merges.is_empty();
        match call {
            Call::AddFromTable { name, .. } => {
                refuse(
                    name.contains('.') || self.find(name).is_some(),
                    ErrorKind::Adapter,
                );
                refuse(merged, ErrorKind::State);
            }
            Call::AddWithRows { name, .. } => {
                refuse(
                    name.contains('.') || self.find(name).is_some(),
                    ErrorKind::Adapter,
                );
            }
            Call::Activate { names, overlap } => {
                let others: Vec<_> = self
                    .adapters
                    .iter()
                    .filter(|other| self.is_merged(other.name))
                    .collect();
                refusals.extend(self.unfit(names, overlap, &others));
            }
            Call::Disable => refuse(merged, ErrorKind::State),
            Call::Enable => {}
            Call::MergeActive(check) => return self.merge_refusals(&self.active, &self.overlap, *check),
            Call::Merge {
                names,
                overlap,
                check,
            } => return self.merge_refusals(names, overlap, *check),
            Call::Unmerge => refuse(!merged, ErrorKind::State),
            Call::Delete(name) => {
                refuse(self.find(name).is_none(), ErrorKind::Adapter);
                refuse(
                    self.active.contains(name) || self.is_merged(name),
                    ErrorKind::State,
                );
            }
            Call::SetRows { name, .. } | Call::Step { name, .. } => {
                refuse(self.find(name).is_none(), ErrorKind::Adapter);
                refuse(self.is_merged(name), ErrorKind::State);
            }
            Call::SetRowsOfActive(_) => match self.active[..] {
                [name] => refuse(self.is_merged(name), ErrorKind::State),
                _ => refuse(true, ErrorKind::State),
            },
            Call::Mixed { adapters, .. } => {
                let unknown = |name: &&str| self.find(name).is_none();
                refuse(adapters.iter().flatten().any(unknown), ErrorKind::Adapter);
                refuse(merged || !self.enabled, ErrorKind::State);
            }
        }
        refusals
    }

    /// What is wrong with adapters that are to be in effect together, beside `others` (SPEC.md A1, A5, A7, A11).
    fn unfit(&self, names: &[&str], overlap: &Overlap, others: &[&Member]) -> Vec<ErrorKind> {
        let mut refusals = Vec::new();
        let known = |name: &&str| self.find(name).is_some();
        let twice = (1..names.len()).any(|at| names[..at].contains(&names[at]));
        if twice || !names.iter().all(known) {
            refusals.push(ErrorKind::Adapter);
        }
        if let Overlap::WeightedMean(weights) = overlap
            && weights.len() != names.len()
        {
            refusals.push(ErrorKind::Shape);
        }
        let members = self.members(names);
        let shared =
            |a: &Member, b: &Member| a.name != b.name && a.tokens.iter().any(|id| b.tokens.contains(id));
        let among = members.iter().any(|a| members.iter().any(|b| shared(a, b)));
        let beside = members.iter().any(|a| others.iter().any(|b| shared(a, b)));
        if *overlap == Overlap::Refuse && among || *overlap != Overlap::LastWins && beside {
            refusals.push(ErrorKind::Overlap);
        }
        refusals
    }

    fn merge_refusals(&self, names: &[&str], overlap: &Overlap, check: MergeCheck) -> Vec<ErrorKind> {
        let beside = |other: &&Member| {
            !names.contains(&other.name) && (self.is_merged(other.name) || self.active.contains(&other.name))
        };
        let others: Vec<_> = self.adapters.iter().filter(beside).collect();
        let mut refusals = self.unfit(names, overlap, &others);
        if !self.enabled || names.is_empty() || names.iter().any(|name| self.is_merged(name)) {
            refusals.push(ErrorKind::State);
        }
        // What is wrong with the rows shows once all else is right.
        if refusals.is_empty() && check == MergeCheck::Finite {
            let members = self.members(names);
            let finite = in_effect(&self.table, &members, overlap).and_then(|dense| {
                let ids: Vec<u32> = members.iter().flat_map(|member| member.tokens.clone()).collect();
                Ok(select(&dense, &ids)?.to_f64_vec().iter().all(|x| x.is_finite()))
            });
            refusals.extend((finite != Ok(true)).then_some(ErrorKind::NonFinite));
        }
        refusals
    }

    /// Does what the call says; a mixed batch has rows to show.
    pub(super) fn accept(&mut self, call: &Call) -> Result<Option<TokenRows>, Failure> {
        let ([v, d], dtype) = (self.table.shape(), self.table.dtype());
        match call {
            Call::AddFromTable { name, tokens } => {
                let tokens = distinct(tokens, v);
                let rows = select(&self.table, &tokens)?.to_dtype(dtype.default_row_dtype());
                self.adapters.push(Member { name, tokens, rows });
            }
            Call::AddWithRows { name, tokens, rows } => {
                let tokens = distinct(tokens, v);
                let rows = rows.rows(dtype, tokens.len(), d);
                self.adapters.push(Member { name, tokens, rows });
            }
            Call::Activate { names, overlap } => {
                self.active.clone_from(names);
                self.overlap.clone_from(overlap);
            }
            Call::Disable => self.enabled = false,
            Call::Enable => self.enabled = true,
            Call::MergeActive(_) => self.merge(self.active.clone(), &self.overlap.clone())?,
            Call::Merge { names, overlap, .. } => self.merge(names.clone(), overlap)?,
            Call::Unmerge => self.unmerge(),
            Call::Delete(name) => self.adapters.retain(|member| member.name != *name),
            Call::SetRows { name, rows } => self.change(name, |old| {
                rows.rows(dtype, old.num_rows(), d).to_dtype(old.dtype())
            }),
            Call::SetRowsOfActive(rows) => {
                let name = self.active.first().copied().unwrap_or_default();
                self.change(name, |old| {
                    rows.rows(dtype, old.num_rows(), d).to_dtype(old.dtype())
                });
            }
            Call::Step { name, gradient } => {
                self.change(name, |old| step(old, &gradient.rows(dtype, old.num_rows(), d)));
            }
            Call::Mixed { ids, adapters } => {
                let ids = Call::mixed_ids(ids, v);
                let length = ids.len() / adapters.len();
                let mut bytes = Vec::new();
                for (ids, adapter) in ids.chunks_exact(length).zip(adapters) {
                    let chosen = self.members(adapter.as_slice());
                    let table = in_effect(&self.table, &chosen, &Overlap::Refuse)?;
                    bytes.extend(select(&table, ids)?.to_le_bytes());
                }
                return Ok(Some(TokenRows::from_le_bytes(dtype, ids.len(), d, &bytes)?));
            }
        }
        Ok(None)
    }

    fn change(&mut self, name: &str, change: impl Fn(&TokenRows) -> TokenRows) {
        for member in self.adapters.iter_mut().filter(|member| member.name == name) {
            member.rows = change(&member.rows);
        }
    }

    fn merge(&mut self, names: Vec<&'static str>, overlap: &Overlap) -> Result<(), Failure> {
        let merged = in_effect(&self.table, &self.members(&names), overlap)?;
        let before = std::mem::replace(&mut self.table, merged);
        self.merges.push((names, before));
        Ok(())
    }

    pub(super) fn unmerge(&mut self) {
        if let Some((_, before)) = self.merges.pop() {
            self.table = before;
        }
    }
}

/// `R(w + (-lr) * g)` (SPEC.md O6), a gradient of another type rounded first (O1).
fn step(rows: &TokenRows, gradient: &TokenRows) -> TokenRows {
    let dtype = rows.dtype();
    // Each operation rounds to the compute type, of which a product and a sum of two fit a double.
    let round = |x: f64| {
        if dtype == DType::F64 {
            x
        } else {
            f64::from(f32::from_f64(x))
        }
    };
    let gradient = gradient.to_dtype(dtype).to_f64_vec();
    let pairs = rows.to_f64_vec().into_iter().zip(gradient);
    let values = pairs.map(|(w, g)| round(w + round(-RATE * g))).collect();
    let [k, d] = rows.shape();
    TokenRows::new::<f64>(values, k, d).map_or_else(|_| rows.clone(), |stepped| stepped.to_dtype(dtype))
}

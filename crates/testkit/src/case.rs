//! The one list of cases.

use std::fmt;
use std::sync::{PoisonError, RwLock};

use crate::{Harness, Outcome};

/// What a case is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Group {
    /// The frozen table.
    Source,
    /// The trained rows.
    Delta,
    /// The rows of a batch.
    Lookup,
    /// The gradient of the trained rows from lookups.
    Gradient,
    /// The head that shares the table.
    Head,
    /// Writing the rows into the table, and taking them out again.
    Merge,
    /// Saved rows, put over a table and taken off again.
    Adapters,
    /// The shared optimizers over the framework's rows.
    Optimizer,
    /// What happens around a step.
    Hooks,
    /// Adapters and training states in files.
    Serialization,
    /// What is refused, and as what.
    Errors,
    /// No V in the cost.
    Allocation,
}

impl fmt::Display for Group {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&format!("{self:?}").to_lowercase())
    }
}

/// One case of the kit, for one harness.
#[derive(Clone, Copy, Debug)]
pub struct Case {
    /// What it is about.
    pub group: Group,
    /// Its name: what holds if it passes.
    pub name: &'static str,
    /// The clauses of SPEC.md that it checks.
    pub clauses: &'static str,
    run: fn() -> Outcome,
}

/// Cases that count allocations run alone: the counters are the process's.
static COUNTING: RwLock<()> = RwLock::new(());

impl Case {
    /// Runs the case.
    ///
    /// # Errors
    ///
    /// The reason, with the case's name and clauses.
    pub fn run(&self) -> Result<(), String> {
        let outcome = if self.group == Group::Allocation {
            let _alone = COUNTING.write().unwrap_or_else(PoisonError::into_inner);
            (self.run)()
        } else {
            let _shared = COUNTING.read().unwrap_or_else(PoisonError::into_inner);
            (self.run)()
        };
        let Self {
            group, name, clauses, ..
        } = self;
        outcome.map_err(|failure| format!("{group}::{name} (SPEC.md {clauses}): {}", failure.reason()))
    }
}

/// Makes of the one list both [`cases`] and [`conformance_tests!`](crate::conformance_tests). `$` comes in as a token
/// because a macro cannot write it into a macro that it makes.
macro_rules! list {
    ($d:tt $($group:ident $variant:ident { $($case:ident: $clauses:literal,)+ })+) => {
        /// Every case of the kit, for one harness.
        pub fn cases<H: Harness>() -> Vec<Case> {
            vec![$($(Case {
                group: Group::$variant,
                name: stringify!($case),
                clauses: $clauses,
                run: crate::cases::$group::$case::<H>,
            },)+)+]
        }

        /// Makes a `#[test]` of every case of the kit, for each of the harnesses given, and installs the allocator
        /// that the cases of the group `allocation` count with: one call per test program.
        ///
        /// ```no_run
        /// # use trainable_tokens_testkit::{Harness, conformance_tests};
        /// # macro_rules! example { ($F32Harness:ty, $F16Harness:ty) => {
        /// conformance_tests! {
        ///     f32: $F32Harness,
        ///     f16: $F16Harness, without head "the framework has no matrix product of this type",
        /// }
        /// # } }
        /// # fn main() {}
        /// ```
        ///
        /// What a framework cannot do is left out by the group's name, and with the reason.
        #[macro_export]
        macro_rules! conformance_tests {
            ($d($d name:ident: $d harness:ty $d(, without $d left_out:ident $d reason:literal)*),+ $d(,)?) => {
                #[global_allocator]
                static ALLOCATOR: $crate::CountingAllocator = $crate::CountingAllocator;
                mod conformance {
                    $d($crate::conformance_tests!(@harness $d name $d harness; [$d($d left_out)*]);)+
                }
            };
            (@harness $d name:ident $d harness:ty; $d left_out:tt) => {
                mod $d name {
                    #[allow(unused_imports)]
                    use super::super::*;
                    type UnderTest = $d harness;
                    $($crate::unless_left_out! { $group $d left_out {
                        mod $group {
                            $(#[test]
                            fn $case() {
                                let name = (stringify!($group), stringify!($case));
                                if let Err(reason) = $crate::run_case::<super::UnderTest>(name.0, name.1) {
                                    panic!("{reason}");
                                }
                            })+
                        }
                    } })+
                }
            };
        }
    };
}

/// Runs the case of this group and name.
///
/// # Errors
///
/// The reason why it fails, or that there is no such case.
pub fn run_case<H: Harness>(group: &str, name: &str) -> Result<(), String> {
    let all = cases::<H>();
    let case = all
        .iter()
        .find(|case| case.name == name && case.group.to_string() == group);
    case.ok_or_else(|| format!("there is no case {group}::{name}"))?
        .run()
}

/// Keeps the items of a group unless it is among those left out.
#[doc(hidden)]
#[macro_export]
macro_rules! unless_left_out {
    ($group:ident [] { $($items:tt)* }) => { $($items)* };
    (source [source $($rest:ident)*] $items:tt) => {};
    (delta [delta $($rest:ident)*] $items:tt) => {};
    (lookup [lookup $($rest:ident)*] $items:tt) => {};
    (gradient [gradient $($rest:ident)*] $items:tt) => {};
    (head [head $($rest:ident)*] $items:tt) => {};
    (merge [merge $($rest:ident)*] $items:tt) => {};
    (adapters [adapters $($rest:ident)*] $items:tt) => {};
    (optimizer [optimizer $($rest:ident)*] $items:tt) => {};
    (hooks [hooks $($rest:ident)*] $items:tt) => {};
    (serialization [serialization $($rest:ident)*] $items:tt) => {};
    (errors [errors $($rest:ident)*] $items:tt) => {};
    (allocation [allocation $($rest:ident)*] $items:tt) => {};
    ($group:ident [$other:ident $($rest:ident)*] $items:tt) => {
        $crate::unless_left_out! { $group [$($rest)*] $items }
    };
}

list! { $
    source Source {
        sizes_are_those_of_the_table: "?",
        rows_are_read_bit_for_bit: "?",
        reading_out_of_range_is_refused: "?",
        writing_changes_no_other_row: "?",
        a_refused_write_changes_nothing: "?",
    }
    delta Delta {
        holds_the_rows_it_was_made_of: "?",
        reads_what_was_written: "?",
        a_refused_write_changes_nothing: "?",
        an_update_sees_and_replaces: "?",
        a_written_row_is_seen_by_the_next_lookup: "?",
    }
    lookup Lookup {
        untrained_rows_are_a_no_op: "?",
        trained_rows_replace_the_base: "?",
        odd_values_pass_unchanged: "?",
        trained_rows_are_rounded_as_the_table_would: "?",
        rows_belong_to_tokens_in_the_order_given: "?",
        no_token_is_the_plain_lookup: "?",
        every_token_may_train: "?",
        batches_may_be_empty_or_single: "?",
        a_lookup_changes_nothing: "?",
        a_scale_applies_after_the_override: "?",
        max_norm_shortens_rows: "?",
        max_norm_comes_before_the_scale: "?",
    }
    gradient Gradient {
        repeats_are_summed_by_slot: "?",
        absent_tokens_get_zero: "?",
        a_batch_without_trainable_tokens_gives_zeros: "?",
        no_token_has_no_gradient_row: "?",
        lookups_of_one_pass_add_up: "?",
        repeats_are_summed_in_the_compute_type: "?",
        the_padding_token_gets_no_gradient: "?",
        the_padding_token_trains_if_asked: "?",
        a_scale_multiplies_the_gradient: "?",
        frequent_ids_count_less_if_asked: "?",
        max_norm_leaves_the_gradient: "?",
        options_combine: "?",
        merged_rows_get_no_gradient: "?",
    }
    head Head {
        untrained_rows_are_a_no_op: "?",
        trained_columns_replace_the_bases: "?",
        other_columns_keep_their_bits: "?",
        hidden_states_get_the_gradient_of_the_new_rows: "?",
        rows_get_the_heads_gradient: "?",
        lookup_and_head_add_up: "?",
        options_of_the_lookup_do_not_touch_the_head: "?",
        a_merged_head_agrees: "?",
        hidden_states_may_be_empty: "?",
        every_column_may_train: "?",
    }
    merge Merge {
        merging_writes_the_rows_and_nothing_else: "?",
        merged_and_unmerged_lookups_are_equal: "?",
        unmerging_restores_every_bit: "?",
        unmerging_restores_what_was_overwritten: "?",
        merges_do_not_nest: "?",
        a_merged_layer_does_not_train: "?",
        training_goes_on_after_unmerging: "?",
    }
    adapters Adapters {
        given_rows_keep_bits_and_type: "?",
        new_rows_are_copies_of_the_bases: "?",
        adapters_of_the_same_tokens_switch: "?",
        other_types_are_converted: "?",
        one_table_serves_adapters_in_turn: "?",
        merged_adapters_of_disjoint_tokens_add_up: "?",
        rows_that_do_not_fit_are_refused: "?",
    }
    optimizer Optimizer {
        equal_gradients_give_equal_bits: "?",
        a_step_takes_the_frameworks_gradients: "?",
        training_leaves_the_base: "?",
        training_moves_the_rows: "?",
        a_resumed_run_ends_with_the_same_bits: "?",
        updates_are_dense: "?",
        memory_is_like_the_rows: "?",
        a_refused_step_changes_nothing: "?",
    }
    hooks Hooks {
        hooks_run_in_order: "?",
        a_hook_sees_and_changes_the_step: "?",
        a_hooks_learning_rate_counts_once: "?",
        a_failing_hook_cancels_the_step: "?",
        a_hook_that_fails_late_keeps_the_update: "?",
        a_hook_may_not_reshape: "?",
        clipping_limits_the_norm: "?",
        decay_pulls_toward_the_original: "?",
    }
    serialization Serialization {
        an_adapter_gives_the_rows_back: "?",
        the_file_keeps_the_order_of_slots: "?",
        the_digest_is_that_of_the_bytes: "?",
        an_adapter_knows_its_table: "?",
        a_saved_run_goes_on_with_the_same_bits: "?",
    }
    errors Errors {
        ids_out_of_range_are_refused: "?",
        a_token_set_of_another_vocabulary_is_refused: "?",
        a_plan_of_another_token_set_is_refused: "?",
        hidden_states_of_another_width_are_refused: "?",
        padding_outside_the_vocabulary_is_refused: "?",
        refusals_change_nothing: "?",
    }
    allocation Allocation {
        a_step_allocates_no_table: "?",
        a_step_costs_the_same_for_any_vocabulary: "?",
        the_head_allocates_no_table: "?",
        wrapping_allocates_no_table: "?",
        merging_allocates_no_table: "?",
        the_optimizer_keeps_rows_only: "?",
    }
}

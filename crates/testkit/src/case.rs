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
    /// How rows start.
    Init,
    /// The trained rows.
    Delta,
    /// The rows of a batch.
    Lookup,
    /// The gradient of the trained rows from lookups.
    Gradient,
    /// The head that shares the table.
    Head,
    /// The cross-entropy of the head, without a matrix of all logits.
    Loss,
    /// Writing the rows into the table, and taking them out again.
    Merge,
    /// Saved rows, put over a table and taken off again.
    Adapters,
    /// Several adapters by name over one table: active together, mixed in a batch, merged.
    Several,
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

/// Cases that count allocations run alone: the counters are the process's. They are those of the group, and those whose name
/// says so.
static COUNTING: RwLock<()> = RwLock::new(());

impl Case {
    /// Runs the case.
    ///
    /// # Errors
    ///
    /// The reason, with the case's name and clauses.
    pub fn run(&self) -> Result<(), String> {
        let outcome = if self.group == Group::Allocation || self.name.contains("allocates") {
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

        /// Group and name of every case, and the clauses of SPEC.md that it cites.
        pub const CITATIONS: &[(Group, &str, &str)] = &[
            $($((Group::$variant, stringify!($case), $clauses),)+)+
        ];

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
            (@harnesses) => {};
            (@harnesses $d name:ident: $d harness:ty $d(, $d($d rest:tt)*)?) => {
                $crate::conformance_tests!(@without $d name $d harness; []; $d($d($d rest)*)?);
            };
            (@without $d name:ident $d harness:ty; [$d($d left_out:ident)*];
                without $d group:ident $d reason:literal $d(, $d($d rest:tt)*)?) => {
                $crate::conformance_tests!(
                    @without $d name $d harness; [$d($d left_out)* $d group]; $d($d($d rest)*)?
                );
            };
            (@without $d name:ident $d harness:ty; $d left_out:tt; $d($d rest:tt)*) => {
                $crate::conformance_tests!(@harness $d name $d harness; $d left_out);
                $crate::conformance_tests!(@harnesses $d($d rest)*);
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
            ($d($d harnesses:tt)+) => {
                #[global_allocator]
                static ALLOCATOR: $crate::CountingAllocator = $crate::CountingAllocator;
                mod conformance {
                    $crate::conformance_tests!(@harnesses $d($d harnesses)+);
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
    (init [init $($rest:ident)*] $items:tt) => {};
    (delta [delta $($rest:ident)*] $items:tt) => {};
    (lookup [lookup $($rest:ident)*] $items:tt) => {};
    (gradient [gradient $($rest:ident)*] $items:tt) => {};
    (head [head $($rest:ident)*] $items:tt) => {};
    (loss [loss $($rest:ident)*] $items:tt) => {};
    (merge [merge $($rest:ident)*] $items:tt) => {};
    (adapters [adapters $($rest:ident)*] $items:tt) => {};
    (several [several $($rest:ident)*] $items:tt) => {};
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
        sizes_are_those_of_the_table: "R1, T11",
        rows_are_read_bit_for_bit: "R5, R11, N1",
        reading_out_of_range_is_refused: "L2, T4, E2",
        writing_changes_no_other_row: "M2, N1",
        a_refused_write_changes_nothing: "E3, E4",
    }
    init Init {
        rows_are_those_of_the_formulas: "I1, I2, I3, I4, I7, R7, N1",
        kept_rows_are_not_computed_with: "I3, I9, R5",
        a_seed_stands_for_these_numbers: "I6, I7, I8",
        equal_tables_and_seeds_give_equal_rows: "I1, I5, I6, I7",
        slots_may_start_in_their_own_ways: "I1, I2, T8",
        what_cannot_be_initialised_is_refused: "I10, E2, E4",
        texts_are_those_of_the_specification: "I11",
        an_adapter_tells_how_it_started: "I12",
    }
    delta Delta {
        holds_the_rows_it_was_made_of: "T10, R5, N1",
        reads_what_was_written: "N1, R5",
        a_refused_write_changes_nothing: "E3, E4",
        an_update_sees_and_replaces: "N1",
        an_updates_error_is_handed_on: "K5, K6",
        a_written_row_is_seen_by_the_next_lookup: "L4",
        a_nan_stays_a_nan: "R6",
    }
    lookup Lookup {
        untrained_rows_are_a_no_op: "L3, L11, L12, T9",
        trained_rows_replace_the_base: "L4, L5, N3",
        odd_values_pass_unchanged: "L11, R5",
        trained_rows_are_rounded_as_the_table_would: "L4, L13, R3, R7",
        rows_belong_to_tokens_in_the_order_given: "T1",
        no_token_is_the_plain_lookup: "T7, L12",
        every_token_may_train: "T7, L5",
        batches_may_be_empty_or_single: "L1",
        a_lookup_changes_nothing: "T11, L14, N4",
        a_scale_applies_after_the_override: "L6, L9, L10, R8, R9",
        max_norm_shortens_rows: "L7, L8",
        max_norm_comes_before_the_scale: "L6",
    }
    gradient Gradient {
        repeats_are_summed_by_slot: "G1, G3, G8, N2, N3",
        absent_tokens_get_zero: "G9",
        a_batch_without_trainable_tokens_gives_zeros: "G9",
        no_token_has_no_gradient_row: "G12",
        lookups_of_one_pass_add_up: "G13",
        repeats_are_summed_in_the_compute_type: "G2, G14, R2",
        the_padding_token_gets_no_gradient: "G5, G6",
        the_padding_token_trains_if_asked: "G5",
        a_scale_multiplies_the_gradient: "G3",
        frequent_ids_count_less_if_asked: "G4",
        max_norm_leaves_the_gradient: "G7",
        options_combine: "G3, G4, G5, G7",
        merged_rows_get_no_gradient: "G11, H8",
    }
    head Head {
        untrained_rows_are_a_no_op: "H4",
        trained_columns_replace_the_bases: "H1, H3",
        other_columns_keep_their_bits: "H4, H5",
        hidden_states_get_the_gradient_of_the_new_rows: "H6",
        rows_get_the_heads_gradient: "H7",
        lookup_and_head_add_up: "H7, G13",
        options_of_the_lookup_do_not_touch_the_head: "H2",
        a_merged_head_agrees: "M12, M6",
        hidden_states_may_be_empty: "H1",
        every_column_may_train: "H1, T7",
        an_untied_head_has_rows_of_its_own: "H9, H7, G10",
        written_rows_are_seen_by_the_next_logits: "H1, L4",
    }
    loss Loss {
        the_loss_is_that_of_the_logits: "X1, X2, X3, X4, X7",
        gradients_are_those_of_the_logits: "X2, X6, X7, G10",
        chunks_change_rounding_only: "X8",
        ignored_rows_do_not_count: "X1, X5",
        untrained_rows_are_a_no_op: "X9",
        no_label_has_a_sum_but_no_mean: "X4, X6, G9, E4",
        what_does_not_fit_is_refused: "X1, X2, X8, E2, E4",
        lookup_head_and_loss_add_up: "X6, G13",
        the_loss_sees_the_rows_in_effect: "X6, A4, A6, A9, G11, M6",
        the_loss_allocates_a_chunk_of_logits: "X8",
    }
    merge Merge {
        merging_writes_the_rows_and_nothing_else: "M2, M9, R3",
        merged_and_unmerged_lookups_are_equal: "M12, M6",
        unmerging_restores_every_bit: "M1, M3, M7",
        unmerging_restores_what_was_overwritten: "M1, M3",
        merges_do_not_nest: "M4, M5",
        a_merged_layer_does_not_train: "M6, E3",
        training_goes_on_after_unmerging: "M7",
        no_token_can_be_merged: "M10, M5, T7",
        a_failed_write_does_not_change_the_state: "M8, E3",
    }
    adapters Adapters {
        given_rows_keep_bits_and_type: "T10",
        new_rows_are_copies_of_the_bases: "T9, R4, R10",
        adapters_of_the_same_tokens_switch: "L4, T11",
        other_types_are_converted: "R3, R4, R7",
        one_table_serves_adapters_in_turn: "M3, M11",
        merged_adapters_of_disjoint_tokens_add_up: "M2, M11",
        rows_that_do_not_fit_are_refused: "T10, E3, E4",
    }
    several Several {
        a_new_layers_only_adapter_is_called_default: "A3",
        adapters_of_disjoint_tokens_act_together: "A3, A4, L5, R5",
        inactive_adapters_leave_no_trace: "A2, A3",
        several_untrained_adapters_are_a_no_op: "A4, L12, H4",
        the_last_of_overlapping_adapters_wins: "A6",
        overlapping_rows_are_averaged_by_weight: "A7, A8, R8",
        adapters_of_several_types_act_together: "A8, R4, R7",
        options_apply_to_the_rows_in_effect: "A4, L6",
        the_head_sees_the_rows_in_effect: "A4, A6, A7, H1",
        rewritten_rows_are_seen_by_the_next_lookup_and_head: "A2, A4, L4",
        disabling_shows_the_table_until_enabled: "A9",
        each_adapter_gets_its_own_gradient: "A4, A16, G13, H7",
        shadowed_rows_get_a_zero_gradient: "A6, G9",
        weighted_rows_get_their_share_of_the_gradient: "A7",
        hidden_states_get_the_gradient_of_the_rows_in_effect: "A4, H6",
        inactive_and_merged_adapters_get_no_gradient: "A4, A11, G11",
        a_step_by_name_moves_one_adapter_only: "A2, A14",
        examples_see_the_adapters_that_they_choose: "A15, L5",
        options_apply_to_mixed_batches: "A15, L6",
        a_mixed_head_projects_by_the_adapters_of_its_examples: "A15, H1",
        mixed_examples_train_their_own_adapters: "A16, G4, G5, G13, H7",
        chosen_adapters_without_a_token_in_the_batch_get_zeros: "A16, G9",
        hidden_states_get_the_gradient_of_their_examples_rows: "A15, H6",
        mixed_batches_may_be_empty: "A15, L1",
        several_adapters_merge_as_one_entry: "A10, M2, M3",
        stacked_merges_are_undone_in_order: "A10, A11, M4",
        merged_and_active_adapters_act_together: "A4, A11",
        a_checked_merge_names_the_culprit: "A12, E2, R3",
        a_checked_merge_looks_at_the_rows_written_only: "A12",
        names_are_checked: "A1, A17, E4",
        a_token_of_two_active_adapters_is_refused: "A5, A11, A17, E4",
        weights_are_checked: "A7, A17, E4",
        adapters_in_use_are_not_deleted: "A13, A17, E4",
        the_one_active_adapter_must_be_one: "A14, A17, E4",
        merged_rows_are_not_left_out_or_started_from: "A3, A9, A16, A17, E4",
        mixed_batches_that_do_not_fit_are_refused: "A1, A15, A16, A17, E4",
        plans_of_other_adapters_are_refused: "A15, A17, L14",
        any_sequence_of_calls_agrees_with_the_dense_model: "A2, A3, A5, A10, A11, A17, M3, M4",
    }
    optimizer Optimizer {
        equal_gradients_give_equal_bits: "O3, O4, O6, O7, O8, O9, O11, O19",
        a_step_takes_the_frameworks_gradients: "O1, G14, K7",
        training_leaves_the_base: "T11, G10",
        training_moves_the_rows: "O2",
        a_resumed_run_ends_with_the_same_bits: "O15, O17",
        updates_are_dense: "O2",
        memory_is_like_the_rows: "O5, O14",
        a_refused_step_changes_nothing: "O1, O13, O18",
        settings_are_checked: "O12, O11, E4",
        powers_follow_the_step_count: "O10, O3, O8",
        a_state_of_other_rows_is_refused: "O16, O18, E4",
    }
    hooks Hooks {
        hooks_run_in_order: "K1",
        a_hook_sees_and_changes_the_step: "K2, K3, K7",
        a_hooks_learning_rate_counts_once: "K3, O4",
        a_failing_hook_cancels_the_step: "K5",
        a_hook_that_fails_late_keeps_the_update: "K6",
        a_hook_may_not_reshape: "K4",
        clipping_limits_the_norm: "K8",
        decay_pulls_toward_the_original: "K9",
        rows_are_clamped_to_a_norm: "K10",
        rows_are_scaled_to_their_norms: "K11",
    }
    serialization Serialization {
        an_adapter_gives_the_rows_back: "F17, F20, F22, N1",
        the_file_keeps_the_order_of_slots: "F7, T1",
        the_digest_is_that_of_the_bytes: "D7, R11",
        an_adapter_knows_its_table: "D3, D8, B4",
        odd_values_survive: "F25, F17, R5, N1",
        copies_of_tied_rows_must_agree: "F20, F22",
        a_module_is_targeted_as_the_config_says: "F8, F9, F10, F11, F21",
        what_would_be_read_otherwise_is_not_written: "F22, F23, F17",
        an_adapter_is_two_files: "F1, F27",
        peft_files_stay_the_same: "F24, F4, F5, F15, F16",
        a_directory_appears_whole_or_not_at_all: "F26, E3",
        a_new_config_is_spelled_as_peft_does: "F3, F5, F6, T1",
        other_fields_are_kept_and_spelled_as_python_does: "F4, F5, F6",
        a_config_is_strict_json: "F2, E1",
        fields_have_their_types: "F3, F8",
        token_indices_are_distinct_integers: "F7, T2",
        other_kinds_of_adapters_are_told_apart: "F12, E4",
        a_lora_config_is_that_of_peft: "F28, F29",
        lora_keeps_the_rows_beside_its_weights: "F19, F28, F30, F31, N1",
        lora_tells_the_tokens_of_each_module: "F29, D2, D3, D6",
        ids_by_module_and_rows_must_fit: "F21, F29, F30, F31",
        a_directory_holds_several_adapters: "F26, F32",
        a_models_tables_are_known_by_name: "B11, B12",
        targets_are_tables_of_the_model: "F9, F10, B12, B13, B14",
        modules_are_named_as_transformers_names_them: "B3, B11, B12, B17, E4",
        adapters_name_modules_with_the_prefix_or_without: "B4, B8, B17, B18, E4",
        rows_extend_a_smaller_base: "B4, B15",
        missing_rows_are_named: "B4, B15",
        a_stored_table_is_the_table: "F33, B15",
        the_rows_file_has_these_bytes: "F13, F15, F16, F17, D1, D2",
        broken_frames_are_refused: "F13, F14, E1, E4",
        other_tensors_are_kept_in_order: "F16, F19",
        names_that_are_almost_rows_are_refused: "F17, F18, F19",
        metadata_are_written_as_specified: "D1, D2, D3, D4, D5",
        metadata_must_parse: "D5, D7, E2",
        metadata_must_agree: "D6",
        a_saved_run_goes_on_with_the_same_bits: "C1, C2, C4, C5, C8, O17",
        a_state_is_written_as_specified: "C1, C2, C3, C4, C5, N1",
        what_is_no_state_is_refused: "C2, C4, C5, C6",
        a_state_is_checked_by_the_optimizer: "C7, O15, O16",
        a_checkpoint_is_one_file_or_an_index_of_shards: "B1, B2, B3",
        an_adapter_fits_tables_of_its_sizes_in_any_type: "B3, B4, B6, T3",
        a_module_without_a_table_must_be_tied_to_one: "B5, E4",
        the_same_table_is_told_from_another: "B7, D8, E4",
        a_merged_checkpoint_differs_in_the_rows_alone: "B8, M2, N1",
        merges_that_would_harm_are_refused: "B9, E3",
        files_without_rows_are_kept: "B10",
        a_merge_grows_the_vocabulary: "B16, B15",
        lora_adds_its_scaled_product: "W1, W2, W3, W4, W5",
        lora_sums_are_rounded_one_by_one: "W6",
        rows_win_over_lora: "W7, B8",
        lora_of_other_kinds_is_refused: "W1, W2, W5, W8, W9, W10, E4",
        a_stored_base_weight_counts: "W10",
        a_checked_merge_names_what_is_not_finite: "W11, E3",
        adapters_with_common_tokens_merge_as_asked: "W12, A6, A7, A8, E4",
    }
    errors Errors {
        ids_out_of_range_are_refused: "L2, T4, E1, E2",
        a_token_set_of_another_vocabulary_is_refused: "T8",
        a_plan_of_another_token_set_is_refused: "L14",
        hidden_states_of_another_width_are_refused: "H10",
        padding_outside_the_vocabulary_is_refused: "G6",
        refusals_change_nothing: "E3, M5",
        a_token_set_names_the_first_culprit: "T2, T4, T5, T6, E2",
        a_vocabulary_beyond_32_bits_is_refused: "T3, E4",
    }
    allocation Allocation {
        a_step_allocates_no_table: "T11, G10",
        a_step_costs_the_same_for_any_vocabulary: "T11",
        the_head_allocates_no_table: "H11",
        wrapping_allocates_no_table: "T11",
        merging_allocates_no_table: "T11, M2",
        several_adapters_allocate_no_table: "A4, A10, A15, T11",
        the_optimizer_keeps_rows_only: "O5",
        initialising_allocates_no_table: "T11, I5",
    }
}

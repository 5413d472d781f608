//! Backends with one fault each: the kit must reject every one of them, by the cases named here.
#![allow(missing_docs, clippy::unwrap_used)]

mod faulty;
mod gradient;
mod head;
mod lookup;
mod loss;
mod mixed;
mod rows;
mod several;
mod table;

use std::collections::BTreeSet;

use faulty::{Broken, Fault, Faulty, Sound};
use half::f16;
use trainable_tokens_testkit::{Case, CountingAllocator, Group, all_cases};

#[global_allocator]
static ALLOCATOR: CountingAllocator = CountingAllocator;

/// The cases that fail with this fault, of those that `which` lets run.
fn failing<T: Faulty>(fault: &'static dyn Fault<T>, which: impl Fn(&Case) -> bool) -> BTreeSet<String> {
    T::set(fault);
    let cases = all_cases::<Broken<T>>();
    let failing = cases.iter().filter(|case| which(case) && case.run().is_err());
    failing
        .map(|case| format!("{}::{}", case.group, case.name))
        .collect()
}

/// Every one of the expected cases must fail. The rest of their groups runs too, to say what else would; but cases that
/// count allocations are slow and run one by one.
fn rejected<T: Faulty, F: Fault<T>>(fault: &'static F, expected: &[&str]) {
    let failing = failing(fault, |case| {
        let group = format!("{}::", case.group);
        expected.iter().any(|name| match name.strip_prefix(&group) {
            Some(name) => {
                let counting = case.group == Group::Allocation || case.name.contains("allocates");
                !counting || case.name == name
            }
            None => false,
        })
    });
    for name in expected {
        assert!(
            failing.contains(*name),
            "{name} lets the fault through, unlike {failing:?}"
        );
    }
}

#[test]
fn without_a_fault_every_case_passes() {
    assert_eq!(failing::<f32>(&Sound, |_| true), BTreeSet::new());
    assert_eq!(failing::<f16>(&Sound, |_| true), BTreeSet::new());
}

macro_rules! faults {
    ($($name:ident $module:ident::$fault:ident: $($case:literal)+;)+) => { $(
        #[test]
        fn $name() {
            rejected(&$module::$fault, &[$($case),+]);
        }
    )+ };
}

faults! {
    table_clamped_ids table::ClampedIds: "source::reading_out_of_range_is_refused";
    table_stale_reads table::StaleReads:
        "source::writing_changes_no_other_row"
        "merge::unmerging_restores_what_was_overwritten"
        "several::stacked_merges_are_undone_in_order"
        "several::a_checked_merge_looks_at_the_rows_written_only";
    table_sorted_reads table::SortedReads:
        "source::rows_are_read_bit_for_bit"
        "adapters::new_rows_are_copies_of_the_bases";
    table_long_reads_wrap table::LongReadsWrap:
        "source::rows_are_read_bit_for_bit"
        "init::rows_are_those_of_the_formulas"
        "init::equal_tables_and_seeds_give_equal_rows"
        "init::slots_may_start_in_their_own_ways";
    table_nan_read_as_zero table::NanReadAsZero: "init::what_cannot_be_initialised_is_refused";
    table_copied table::TableCopied: "allocation::initialising_allocates_no_table";
    table_minus_zero_unread table::MinusZeroUnread:
        "init::kept_rows_are_not_computed_with"
        "source::rows_are_read_bit_for_bit"
        "merge::unmerging_restores_every_bit";
    table_nan_payload_unread table::NanPayloadUnread:
        "init::kept_rows_are_not_computed_with"
        "source::rows_are_read_bit_for_bit"
        "merge::unmerging_restores_every_bit";
    table_neighbour_written table::NeighbourWritten:
        "source::writing_changes_no_other_row"
        "merge::merging_writes_the_rows_and_nothing_else"
        "several::several_adapters_merge_as_one_entry";
    table_sorted_ids table::SortedIds:
        "source::writing_changes_no_other_row"
        "merge::merging_writes_the_rows_and_nothing_else";
    table_partly_written table::PartlyWritten: "source::a_refused_write_changes_nothing";
    table_any_type table::AnyType: "source::a_refused_write_changes_nothing";
    table_ids_skipped table::IdsSkipped: "source::a_refused_write_changes_nothing";
    table_minus_zero_unwritten table::MinusZeroUnwritten: "source::writing_changes_no_other_row";
    table_new_table table::NewTable: "allocation::merging_allocates_no_table";
    table_nothing_written table::NothingWritten:
        "source::writing_changes_no_other_row"
        "merge::merges_do_not_nest"
        "serialization::the_digest_is_that_of_the_bytes"
        "several::merged_and_active_adapters_act_together"
        "several::a_checked_merge_names_the_culprit";
    rows_always_single rows::AlwaysSingle:
        "delta::holds_the_rows_it_was_made_of"
        "adapters::given_rows_keep_bits_and_type";
    rows_in_the_tables_type rows::InTheTablesType:
        "delta::holds_the_rows_it_was_made_of"
        "adapters::new_rows_are_copies_of_the_bases";
    rows_table_copied rows::TableCopied: "allocation::wrapping_allocates_no_table";
    rows_read_reversed rows::ReadReversed:
        "delta::holds_the_rows_it_was_made_of"
        "merge::merging_writes_the_rows_and_nothing_else"
        "serialization::the_file_keeps_the_order_of_slots"
        "serialization::lora_keeps_the_rows_beside_its_weights"
        "serialization::rows_win_over_lora"
        "serialization::rows_extend_a_smaller_base";
    rows_stale_reads rows::StaleReads:
        "delta::reads_what_was_written"
        "serialization::a_saved_run_goes_on_with_the_same_bits"
        "several::the_one_active_adapter_must_be_one";
    rows_any_shape rows::AnyShape:
        "delta::a_refused_write_changes_nothing"
        "adapters::rows_that_do_not_fit_are_refused"
        "errors::refusals_change_nothing";
    rows_any_type rows::AnyType: "delta::a_refused_write_changes_nothing";
    rows_updated_reversed rows::UpdatedReversed:
        "delta::an_update_sees_and_replaces"
        "optimizer::equal_gradients_give_equal_bits"
        "several::a_step_by_name_moves_one_adapter_only";
    rows_not_written_back rows::NotWrittenBack:
        "delta::an_update_sees_and_replaces"
        "optimizer::training_moves_the_rows";
    rows_error_swallowed rows::ErrorSwallowed: "delta::an_updates_error_is_handed_on";
    rows_updated_in_half rows::UpdatedInHalf:
        "delta::an_update_sees_and_replaces"
        "optimizer::equal_gradients_give_equal_bits";
    rows_updated_twice rows::UpdatedTwice:
        "optimizer::equal_gradients_give_equal_bits"
        "hooks::hooks_run_in_order";
    rows_large_buffer rows::LargeBuffer: "allocation::the_optimizer_keeps_rows_only";
    lookup_off_by_one_slot lookup::OffByOneSlot: "lookup::rows_belong_to_tokens_in_the_order_given";
    lookup_sorted_slots lookup::SortedSlots:
        "lookup::trained_rows_replace_the_base"
        "lookup::every_token_may_train";
    lookup_deduplicated_hits lookup::DeduplicatedHits:
        "lookup::trained_rows_replace_the_base"
        "lookup::every_token_may_train";
    lookup_last_position_forgotten lookup::LastPositionForgotten:
        "lookup::trained_rows_replace_the_base"
        "lookup::rows_belong_to_tokens_in_the_order_given";
    lookup_padding_drops_the_row lookup::PaddingDropsTheRow: "gradient::the_padding_token_gets_no_gradient";
    lookup_additive lookup::Additive:
        "lookup::untrained_rows_are_a_no_op"
        "lookup::trained_rows_replace_the_base";
    lookup_added_difference lookup::AddedDifference:
        "lookup::trained_rows_replace_the_base"
        "merge::merged_and_unmerged_lookups_are_equal";
    lookup_scaled_before_the_override lookup::ScaledBeforeTheOverride:
        "lookup::a_scale_applies_after_the_override"
        "several::options_apply_to_the_rows_in_effect";
    lookup_truncated lookup::Truncated:
        "lookup::trained_rows_are_rounded_as_the_table_would"
        "merge::merged_and_unmerged_lookups_are_equal";
    lookup_rounded_after_the_scale lookup::RoundedAfterTheScale: "lookup::a_scale_applies_after_the_override";
    lookup_scaled_twice lookup::ScaledTwice: "lookup::a_scale_applies_after_the_override";
    lookup_unscaled lookup::Unscaled: "lookup::a_scale_applies_after_the_override";
    lookup_max_norm_forgotten lookup::MaxNormForgotten: "lookup::max_norm_shortens_rows";
    lookup_minus_zero_lost lookup::MinusZeroLost:
        "lookup::untrained_rows_are_a_no_op"
        "lookup::odd_values_pass_unchanged";
    lookup_subnormals_flushed lookup::SubnormalsFlushed:
        "lookup::untrained_rows_are_a_no_op"
        "lookup::odd_values_pass_unchanged";
    lookup_nan_payload_lost lookup::NanPayloadLost:
        "lookup::untrained_rows_are_a_no_op"
        "lookup::odd_values_pass_unchanged";
    lookup_infinity_lost lookup::InfinityLost:
        "lookup::untrained_rows_are_a_no_op"
        "lookup::odd_values_pass_unchanged";
    lookup_table_copied lookup::TableCopied:
        "allocation::a_step_allocates_no_table"
        "allocation::a_step_costs_the_same_for_any_vocabulary";
    lookup_max_norm_after_the_scale lookup::MaxNormAfterTheScale: "lookup::max_norm_comes_before_the_scale";
    lookup_max_norm_in_place lookup::MaxNormInPlace: "lookup::max_norm_shortens_rows";
    lookup_base_written lookup::BaseWritten:
        "lookup::a_lookup_changes_nothing"
        "adapters::adapters_of_the_same_tokens_switch"
        "several::inactive_adapters_leave_no_trace"
        "several::names_are_checked"
        "several::weights_are_checked"
        "several::plans_of_other_adapters_are_refused";
    lookup_stale_rows lookup::StaleRows:
        "delta::a_written_row_is_seen_by_the_next_lookup"
        "adapters::adapters_of_the_same_tokens_switch";
    lookup_stale_table lookup::StaleTable: "merge::merged_and_unmerged_lookups_are_equal";
    lookup_empty_batch_has_no_width lookup::EmptyBatchHasNoWidth:
        "lookup::batches_may_be_empty_or_single"
        "several::mixed_batches_may_be_empty";
    gradient_off_by_one_slot gradient::OffByOneSlot:
        "gradient::repeats_are_summed_by_slot"
        "gradient::absent_tokens_get_zero";
    gradient_sorted_by_id gradient::SortedById:
        "gradient::repeats_are_summed_by_slot"
        "gradient::absent_tokens_get_zero";
    gradient_repeats_overwritten gradient::RepeatsOverwritten:
        "gradient::repeats_are_summed_by_slot"
        "gradient::repeats_are_summed_in_the_compute_type";
    gradient_padding_trains gradient::PaddingTrains:
        "gradient::the_padding_token_gets_no_gradient"
        "several::mixed_examples_train_their_own_adapters";
    gradient_padding_never_trains gradient::PaddingNeverTrains: "gradient::the_padding_token_trains_if_asked";
    gradient_unscaled gradient::Unscaled:
        "gradient::a_scale_multiplies_the_gradient"
        "gradient::options_combine";
    gradient_scaled_twice gradient::ScaledTwice:
        "gradient::a_scale_multiplies_the_gradient"
        "gradient::options_combine";
    gradient_frequency_of_all gradient::FrequencyOfAll:
        "gradient::frequent_ids_count_less_if_asked"
        "gradient::options_combine";
    gradient_frequency_ignored gradient::FrequencyIgnored:
        "gradient::frequent_ids_count_less_if_asked"
        "gradient::options_combine";
    gradient_averaged gradient::Averaged: "gradient::repeats_are_summed_by_slot";
    gradient_max_norm_trains_through gradient::MaxNormTrainsThrough:
        "gradient::max_norm_leaves_the_gradient"
        "gradient::options_combine";
    gradient_dense_gradient gradient::DenseGradient:
        "allocation::a_step_allocates_no_table"
        "allocation::a_step_costs_the_same_for_any_vocabulary";
    gradient_lookup_overwrites gradient::LookupOverwrites: "gradient::lookups_of_one_pass_add_up";
    gradient_half_sums gradient::HalfSums: "gradient::repeats_are_summed_in_the_compute_type";
    gradient_absent_is_nothing gradient::AbsentIsNothing:
        "gradient::a_batch_without_trainable_tokens_gives_zeros"
        "several::chosen_adapters_without_a_token_in_the_batch_get_zeros";
    gradient_absent_is_garbage gradient::AbsentIsGarbage:
        "gradient::absent_tokens_get_zero"
        "gradient::a_batch_without_trainable_tokens_gives_zeros";
    gradient_merged_still_trains gradient::MergedStillTrains: "gradient::merged_rows_get_no_gradient";
    gradient_base_trains gradient::BaseTrains: "optimizer::training_leaves_the_base";
    head_never_overridden head::NeverOverridden:
        "head::trained_columns_replace_the_bases"
        "head::every_column_may_train";
    head_last_column_lost head::LastColumnLost:
        "head::trained_columns_replace_the_bases"
        "head::every_column_may_train";
    head_sorted_columns head::SortedColumns:
        "head::trained_columns_replace_the_bases"
        "head::every_column_may_train";
    head_additive_columns head::AdditiveColumns:
        "head::untrained_rows_are_a_no_op"
        "head::trained_columns_replace_the_bases"
        "head::a_merged_head_agrees"
        "several::disabling_shows_the_table_until_enabled";
    head_other_bits_of_trainable_columns head::OtherBitsOfTrainableColumns:
        "head::untrained_rows_are_a_no_op"
        "several::several_untrained_adapters_are_a_no_op";
    head_other_bits_once_one_moved head::OtherBitsOnceOneMoved: "head::other_columns_keep_their_bits";
    head_other_bits_of_frozen_columns head::OtherBitsOfFrozenColumns:
        "head::other_columns_keep_their_bits"
        "several::the_head_sees_the_rows_in_effect";
    head_base_bias head::BaseBias: "head::trained_columns_replace_the_bases";
    head_stale_rows head::StaleRows: "head::written_rows_are_seen_by_the_next_logits";
    head_table_copied head::TableCopied: "allocation::the_head_allocates_no_table";
    head_any_width head::AnyWidth: "errors::hidden_states_of_another_width_are_refused";
    head_head_overwrites_lookup head::HeadOverwritesLookup: "head::lookup_and_head_add_up";
    head_rows_get_nothing head::RowsGetNothing:
        "head::rows_get_the_heads_gradient"
        "head::lookup_and_head_add_up";
    head_hidden_sees_the_base head::HiddenSeesTheBase:
        "head::hidden_states_get_the_gradient_of_the_new_rows"
        "several::hidden_states_get_the_gradient_of_the_rows_in_effect";
    head_only_moved_rows_train head::OnlyMovedRowsTrain: "head::rows_get_the_heads_gradient";
    head_scaled_rows head::ScaledRows: "head::options_of_the_lookup_do_not_touch_the_head";
    head_dense_gradient head::DenseGradient: "allocation::the_head_allocates_no_table";
    loss_ignored_rows_count loss::IgnoredRowsCount: "loss::the_loss_is_that_of_the_logits";
    loss_ignored_rows_take_part loss::IgnoredRowsTakePart: "loss::ignored_rows_do_not_count";
    loss_uncapped loss::Uncapped: "loss::the_loss_is_that_of_the_logits";
    loss_always_a_sum loss::AlwaysASum:
        "loss::the_loss_is_that_of_the_logits"
        "loss::chunks_change_rounding_only";
    loss_never_overridden loss::NeverOverridden:
        "loss::the_loss_is_that_of_the_logits"
        "loss::the_loss_sees_the_rows_in_effect";
    loss_other_bits loss::OtherBits: "loss::untrained_rows_are_a_no_op";
    loss_first_chunk_only loss::FirstChunkOnly: "loss::chunks_change_rounding_only";
    loss_all_logits loss::AllLogits: "loss::the_loss_allocates_a_chunk_of_logits";
    loss_upstream_forgotten loss::UpstreamForgotten: "loss::gradients_are_those_of_the_logits";
    loss_loss_overwrites loss::LossOverwrites: "loss::lookup_head_and_loss_add_up";
    loss_rows_get_nothing loss::RowsGetNothing:
        "loss::gradients_are_those_of_the_logits"
        "loss::the_loss_sees_the_rows_in_effect";
    loss_hidden_sees_the_base loss::HiddenSeesTheBase:
        "loss::gradients_are_those_of_the_logits"
        "loss::chunks_change_rounding_only";
    loss_slope_forgotten loss::SlopeForgotten: "loss::gradients_are_those_of_the_logits";
    several_last_adapter_first several::LastAdapterFirst:
        "several::adapters_of_disjoint_tokens_act_together"
        "several::the_last_of_overlapping_adapters_wins"
        "several::examples_see_the_adapters_that_they_choose"
        "several::several_untrained_adapters_are_a_no_op"
        "several::any_sequence_of_calls_agrees_with_the_dense_model";
    several_weights_ignored several::WeightsIgnored:
        "several::overlapping_rows_are_averaged_by_weight"
        "several::several_adapters_merge_as_one_entry";
    several_unnormalised several::Unnormalised:
        "several::overlapping_rows_are_averaged_by_weight"
        "several::the_head_sees_the_rows_in_effect";
    several_summed_in_half several::SummedInHalf:
        "several::overlapping_rows_are_averaged_by_weight"
        "several::the_head_sees_the_rows_in_effect";
    several_summed_in_double several::SummedInDouble: "several::overlapping_rows_are_averaged_by_weight";
    several_picks_first several::PicksFirst:
        "several::overlapping_rows_are_averaged_by_weight"
        "several::the_head_sees_the_rows_in_effect"
        "several::hidden_states_get_the_gradient_of_the_rows_in_effect";
    several_first_summand_twice several::FirstSummandTwice:
        "several::overlapping_rows_are_averaged_by_weight";
    several_minus_zero_lost several::MinusZeroLost: "several::adapters_of_disjoint_tokens_act_together";
    several_stale_rows several::StaleRows:
        "several::rewritten_rows_are_seen_by_the_next_lookup_and_head"
        "several::options_apply_to_mixed_batches"
        "several::any_sequence_of_calls_agrees_with_the_dense_model";
    several_firsts_type several::FirstsType: "several::adapters_of_several_types_act_together";
    several_always_single several::AlwaysSingle: "several::adapters_of_several_types_act_together";
    several_detached several::Detached:
        "several::each_adapter_gets_its_own_gradient"
        "several::mixed_examples_train_their_own_adapters";
    several_large_buffer several::LargeBuffer: "allocation::several_adapters_allocate_no_table";
    several_first_adapter_only several::FirstAdapterOnly:
        "several::each_adapter_gets_its_own_gradient"
        "several::weighted_rows_get_their_share_of_the_gradient"
        "several::mixed_examples_train_their_own_adapters";
    several_zeros_are_nothing several::ZerosAreNothing:
        "several::shadowed_rows_get_a_zero_gradient"
        "several::chosen_adapters_without_a_token_in_the_batch_get_zeros";
    several_zeros_are_nan several::ZerosAreNan:
        "several::shadowed_rows_get_a_zero_gradient"
        "several::chosen_adapters_without_a_token_in_the_batch_get_zeros";
    several_all_are_reached several::AllAreReached:
        "several::inactive_and_merged_adapters_get_no_gradient"
        "several::mixed_examples_train_their_own_adapters";
    several_shares_ignored several::SharesIgnored: "several::weighted_rows_get_their_share_of_the_gradient";
    several_frequency_of_the_batch several::FrequencyOfTheBatch:
        "several::mixed_examples_train_their_own_adapters";
    mixed_parts_reversed mixed::PartsReversed:
        "several::a_mixed_head_projects_by_the_adapters_of_its_examples";
    mixed_parts_from_the_top mixed::PartsFromTheTop:
        "several::a_mixed_head_projects_by_the_adapters_of_its_examples";
    mixed_parts_are_all mixed::PartsAreAll: "several::a_mixed_head_projects_by_the_adapters_of_its_examples";
    mixed_last_part_lost mixed::LastPartLost:
        "several::a_mixed_head_projects_by_the_adapters_of_its_examples";
    mixed_large_buffer mixed::LargeBuffer: "allocation::several_adapters_allocate_no_table";
    mixed_joined_reversed mixed::JoinedReversed:
        "several::a_mixed_head_projects_by_the_adapters_of_its_examples";
    mixed_first_part_only mixed::FirstPartOnly:
        "several::a_mixed_head_projects_by_the_adapters_of_its_examples";
    mixed_no_rows_no_width mixed::NoRowsNoWidth: "several::mixed_batches_may_be_empty";
    mixed_first_adapter_for_all mixed::FirstAdapterForAll:
        "several::mixed_examples_train_their_own_adapters"
        "several::hidden_states_get_the_gradient_of_their_examples_rows";
    mixed_next_adapter mixed::NextAdapter:
        "several::mixed_examples_train_their_own_adapters"
        "several::hidden_states_get_the_gradient_of_their_examples_rows";
    mixed_rows_get_nothing mixed::RowsGetNothing: "several::mixed_examples_train_their_own_adapters";
    mixed_head_overwrites_lookup mixed::HeadOverwritesLookup:
        "several::mixed_examples_train_their_own_adapters";
    mixed_hidden_sees_the_base mixed::HiddenSeesTheBase:
        "several::hidden_states_get_the_gradient_of_their_examples_rows";
}

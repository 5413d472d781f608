//! Several adapters by name over one table: active together, mixed in a batch, merged.

mod active;
mod gradient;
mod merged;
mod mixed;
mod mixed_gradient;
mod overlap;
mod refused;
mod sequence;
mod team;
mod unmixable;

pub use active::{
    a_new_layers_only_adapter_is_called_default, adapters_of_disjoint_tokens_act_together,
    disabling_shows_the_table_until_enabled, inactive_adapters_leave_no_trace,
    rewritten_rows_are_seen_by_the_next_lookup_and_head, several_untrained_adapters_are_a_no_op,
};
pub use gradient::{
    a_step_by_name_moves_one_adapter_only, each_adapter_gets_its_own_gradient,
    hidden_states_get_the_gradient_of_the_rows_in_effect, inactive_and_merged_adapters_get_no_gradient,
    shadowed_rows_get_a_zero_gradient, weighted_rows_get_their_share_of_the_gradient,
};
pub use merged::{
    a_checked_merge_looks_at_the_rows_written_only, a_checked_merge_names_the_culprit,
    merged_and_active_adapters_act_together, several_adapters_merge_as_one_entry,
    stacked_merges_are_undone_in_order,
};
pub use mixed::{
    a_mixed_head_projects_by_the_adapters_of_its_examples, examples_see_the_adapters_that_they_choose,
    mixed_batches_may_be_empty, options_apply_to_mixed_batches,
};
pub use mixed_gradient::{
    chosen_adapters_without_a_token_in_the_batch_get_zeros,
    hidden_states_get_the_gradient_of_their_examples_rows, mixed_examples_train_their_own_adapters,
};
pub use overlap::{
    adapters_of_several_types_act_together, options_apply_to_the_rows_in_effect,
    overlapping_rows_are_averaged_by_weight, the_head_sees_the_rows_in_effect,
    the_last_of_overlapping_adapters_wins,
};
pub use refused::{
    a_token_of_two_active_adapters_is_refused, adapters_in_use_are_not_deleted, names_are_checked,
    the_one_active_adapter_must_be_one, weights_are_checked,
};
pub use sequence::any_sequence_of_calls_agrees_with_the_dense_model;
pub use unmixable::{
    merged_rows_are_not_left_out_or_started_from, mixed_batches_that_do_not_fit_are_refused,
    plans_of_other_adapters_are_refused,
};

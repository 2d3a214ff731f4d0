"""Which modules are mutated, and the tests that have to notice."""

GRADIENTS_OF_TWO_RANKS = [
    f"tests/pipeline/test_pretrain_gradients.py::test_gradients_over_ranks_are_those_of_one_process[{case}]"
    for case in ("dense, ZeRO 1", "experts, ZeRO 2, ep_size 2")
]
"""Two ranks of two micro batches: whatever is scaled by the number of one of them, or of those that share experts."""

EXPORTS_COME_BACK = [
    f"tests/pipeline/test_import_exported.py::test_{case}"
    for case in (
        "an_export_is_imported_as_what_it_was_whatever_its_family",
        "the_tokenizer_that_went_into_an_export_is_that_of_its_import",
        "a_damaged_file_of_an_export_is_named",
        "the_manifest_of_an_export_is_among_what_identifies_it",
    )
]
"""All but the proof by logits, which starts another interpreter."""

LOGITS_OF_EXPORTS = [
    "tests/pipeline/test_export_modeling.py::test_weights_that_lie_on_the_disk_are_brought_in_where_they_are_used"
]
"""Of every family in this process, beside those of our denoiser."""


def _sandbox(*tests: str) -> list[str]:
    return [f"tests/pipeline/test_sandbox{test}" for test in tests]


SANDBOX = {
    "runner": _sandbox(
        ".py::test_leaving_before_the_end_has_not_passed",
        ".py::test_a_program_whose_watcher_is_killed_is_told_as_killed",
        ".py::test_an_endless_loop_that_handles_all_signals_ends_too",
        "_leftovers.py::test_nothing_is_left_of_a_hostile_program[rlimits alone-files in every folder]",
    ),
    "driver": _sandbox(
        ".py::test_the_word_is_not_told_in_arguments_environment_or_open_files",
        ".py::test_leaving_before_the_end_has_not_passed",
    ),
    "launcher": _sandbox(
        ".py::test_more_memory_than_allowed_is_refused",
        ".py::test_endless_output_is_cut_and_ends_with_the_time",
        "_hostile.py::test_the_limit_of_processes_holds",
    ),
    "namespaces": _sandbox(
        ".py::test_all_files_of_its_folder_together_have_a_limit_in_namespaces",
        "_hostile.py::test_a_network_namespace_has_no_way_out",
        "_hostile.py::test_files_of_this_machine_are_not_seen_in_namespaces",
    ),
    "seccomp": _sandbox(
        "_hostile.py::test_no_socket_is_opened",
        "_hostile.py::test_privileges_are_not_had",
        "_leftovers.py::test_memory_that_belongs_to_no_process_is_refused",
    ),
    "leftovers": _sandbox("_hostile.py::test_a_tree_is_deleted_and_what_its_links_lead_to_is_not"),
    "isolation": _sandbox(".py::test_where_namespaces_are_not_allowed_nothing_runs_without_permission"),
    "humaneval": _sandbox("_humaneval.py::test_canonical_solutions_pass_and_empty_ones_do_not"),
    "pass_at_k": _sandbox("_pass_at_k.py"),
}
TASKS = [
    *(
        f"tests/pipeline/test_tasks.py::test_{case}"
        for case in (
            "choices_are_those_of_a_loop_over_one_question_at_a_time[masked]",
            "texts_are_those_of_a_loop_over_one_row_at_a_time[masked]",
            "records_tell_each_question_and_are_the_same_bytes_again",
            "what_does_not_fit_is_counted_and_listed",
            "a_file_that_changes_meanwhile_is_refused",
        )
    ),
    *(
        f"tests/pipeline/test_tasks_written.py::test_{case}"
        for case in (
            "answers_are_those_of_a_loop_over_one_prompt_at_a_time[masked]",
            "programs_are_those_of_a_loop_over_one_sample_at_a_time[masked]",
            "without_namespaces_programs_are_refused_before_weights_are_read",
            "pass_at_k_is_that_of_all_subsets",
            "what_is_drawn_behind_an_end_counts_for_nothing",
            "a_scorer_with_another_tokenizer_reads_the_text",
            "a_process_reads_model_and_scorer_once_for_all_pieces",
            "a_length_beyond_the_rows_is_refused",
            "a_length_that_leaves_no_room_for_a_prompt_is_refused[match-masked]",
            "prompts_that_are_empty_need_no_room",
            "answers_have_half_a_row_unless_a_task_says_how_long",
        )
    ),
    "tests/pipeline/test_tasks_misfits.py::test_what_cannot_be_written_fails_by_itself",
]
"""Of one kind of model each."""
_OF_TASKS = ("likelihoods", "tables", "pieces", "run", "generations", "fit")
PADDED = [
    f"tests/dlm_core/test_padding.py::test_{case}"
    for case in (
        "rows_with_padding_before_them_are_what_they_are_alone[first hitting-guided shifted]",
        "rows_with_padding_before_them_are_what_they_are_alone[first hitting-exact]",
        "rows_of_one_window_with_padding_behind_them_are_what_they_are_alone[first hitting-whole]",
        "padding_is_never_read",
        "next_tokens_behind_prompts_of_unlike_lengths_are_what_they_are_alone",
    )
]
"""One sampler and the contexts that differ; all of them take a minute."""

REMASKED = [
    *(
        f"tests/dlm_core/test_remask.py::test_{case}"
        for case in (
            "remdm_that_takes_nothing_back_is_ancestral_token_for_token",
            "loop_that_takes_nothing_back_is_ancestral_by_its_own_schedule",
            "remdm_keeps_the_mask_rate_of_its_schedule",
            "sigmas_are_those_of_the_formulas",
            "loop_rises_stays_and_rises",
            "tokens_are_taken_back_by_their_confidence_as_often_as_in_the_naive_process",
            "path_planning_that_takes_nothing_back_is_confident_token_for_token",
            "path_planning_is_the_naive_loop",
        )
    ),
    "tests/dlm_core/test_sampler_waits.py::test_no_step_waits",
    "tests/dlm_core/test_every_rule.py::test_a_row_is_filled_and_counted_as_it_is_alone",
    "tests/dlm_core/test_every_rule.py::test_masks_alone_are_asked_for_and_rows_that_have_some",
]
"""All but the laws of thousands of rows in hundreds of steps."""
LOOPED = [
    "tests/dlm_core/test_planned.py",
    "tests/dlm_core/test_confident.py::test_rows_are_those_of_the_naive_loop",
    "tests/dlm_core/test_sampler_waits.py::test_no_step_waits",
    *(
        f"tests/dlm_core/test_sample_blocks.py::test_{case}"
        for case in (
            "rows_are_the_same_in_any_batch",
            "passes_are_heard_of_and_frames_kept_for_the_rows_that_needed_them",
            "change_is_told_positions_of_the_batch_in_every_window",
            "logits_that_give_no_distribution_raise",
        )
    ),
]
"""What the loop does for every rule; rules by themselves are looked at in their own tests."""

WINDOWS = [
    f"tests/dlm_core/test_sample_blocks.py::test_{case}"
    for case in (
        "a_cache_of_clean_blocks_changes_no_token_and_costs_a_pass_a_block",
        "an_approximate_cache_that_is_refreshed_in_every_pass_changes_no_token[FirstHitting, -PrefixCache-0]",
        "an_approximate_cache_that_is_refreshed_in_every_pass_changes_no_token[FirstHitting, -DualCache-1]",
        "rows_are_the_same_in_any_batch",
        "a_change_of_logits_is_told_places_of_the_row_in_any_window",
        "rows_end_behind_their_first_end_token_and_cost_no_more",
        "a_row_that_has_ended_needs_no_pass_of_the_others",
        "the_last_frame_is_the_result_where_rows_end",
        "noise_removal_is_a_pass_of_windows_and_rows_with_masks",
    )
]
"""One sampler where all of them take half a minute."""
EXACT = [
    f"tests/dlm_core/test_caches.py::test_{case}"
    for case in (
        "a_pass_a_block_takes_in_what_something_is_to_be_filled_behind",
        "a_row_counts_what_it_needs_alone",
        "a_row_that_has_ended_needs_no_pass_of_an_exact_cache",
        "windows_behind_an_exact_cache_follow_the_law_of_all_rows",
    )
]

MODULES: dict[str, list[str]] = {
    "schedules": ["tests/dlm_core/test_schedules.py", "tests/dlm_core/test_schedules_chain.py"],
    "noise": ["tests/dlm_core/test_noise.py"],
    "blocks": ["tests/dlm_core/test_blocks.py"],
    "corruption": ["tests/dlm_core/test_corruption.py", "tests/dlm_core/test_corruption_counts.py"],
    "kernels": ["tests/dlm_core/test_kernels.py"],
    "masks": ["tests/dlm_core/test_masks.py"],
    "cross_entropy": [
        "tests/dlm_core/test_cross_entropy.py",
        "tests/dlm_core/test_head_bias.py",
        "tests/dlm_core/test_logits_loss.py",
    ],
    "objectives": [
        "tests/dlm_core/test_objectives.py",
        "tests/dlm_core/test_objectives_oracle.py",
        "tests/dlm_core/test_objectives_terms.py",
        "tests/dlm_core/test_objectives_weights.py",
    ],
    "variance": ["tests/dlm_core/test_variance.py", "tests/dlm_core/test_variance_clip.py"],
    "likelihood": [
        "tests/dlm_core/test_likelihood.py",
        "tests/dlm_core/test_likelihood_errors.py",
        "tests/dlm_core/test_likelihood_rows.py",
    ],
    "corpus_bound": ["tests/dlm_core/test_corpus_bound.py"],
    "answer_masks": ["tests/dlm_core/test_answer_masks.py"],
    "answers": ["tests/dlm_core/test_answers.py"],
    **dict.fromkeys([f"pipeline/tasks/{name}" for name in _OF_TASKS], TASKS),
    "pipeline/inference/model": TASKS,
    "pipeline/inference/pairs": [
        "tests/pipeline/test_tasks_harness.py::test_an_answer_has_all_its_tokens_and_no_others"
    ],
    "intervals": ["tests/dlm_core/test_intervals.py"],
    "ar_init": ["tests/dlm_core/test_ar_init.py", "tests/dlm_core/test_sampler_waits.py"],
    "upcycling": ["tests/dlm_core/test_upcycling.py"],
    "samplers/proposal": ["tests/dlm_core/test_proposal.py", "tests/dlm_core/test_every_rule.py"],
    "samplers/planned": ["tests/dlm_core/test_planned.py", "tests/dlm_core/test_sampler_waits.py"],
    "samplers/quotas": ["tests/dlm_core/test_confident.py"],
    "samplers/confident": [
        "tests/dlm_core/test_confident.py",
        "tests/dlm_core/test_sampler_waits.py",
        "tests/dlm_core/test_every_rule.py",
    ],
    "samplers/remask": REMASKED,
    "samplers/speculative": ["tests/dlm_core/test_speculative.py", "tests/dlm_core/test_every_rule.py"],
    "samplers/contexts": [*WINDOWS, "tests/dlm_core/test_caches.py"],
    "samplers/blocks": [*WINDOWS, *EXACT, *PADDED],
    "samplers/guidance": ["tests/dlm_core/test_guidance.py", *PADDED],
    "samplers/next_tokens": ["tests/dlm_core/test_next_tokens.py", *PADDED],
    "samplers/padding": PADDED,
    "samplers/loop": LOOPED,
    "models/config": ["tests/dlm_core/test_model_config.py"],
    "models/rope": ["tests/dlm_core/test_rope.py"],
    "models/attention": [
        "tests/dlm_core/test_attention.py",
        "tests/dlm_core/test_attention_structured.py",
        "tests/dlm_core/test_kv_cache.py",
    ],
    "models/moe": ["tests/dlm_core/test_moe.py"],
    "models/router_losses": ["tests/dlm_core/test_router_losses.py"],
    "models/init": ["tests/dlm_core/test_init.py"],
    "models/transformer": [
        "tests/dlm_core/test_dit.py",
        "tests/dlm_core/test_block_pass.py",
        "tests/dlm_core/test_transformer.py",
    ],
    "pipeline/tokenizer/mask": ["tests/pipeline/test_tokenizer_checkpoint.py"],
    "pipeline/ar_init/run": [
        f"tests/pipeline/test_ar_init.py::test_{case}"
        for case in (
            "the_row_of_the_mask_is_the_mean_of_the_others_and_no_other_row_is_touched",
            "routers_are_drawn_from_the_seed_with_the_given_width_each_layer_its_own",
            "experts_are_copies_and_the_dense_networks_are_left_out_by_name",
        )
    ],
    "pipeline/hf_directory": EXPORTS_COME_BACK,
    "pipeline/import_checkpoint/source": EXPORTS_COME_BACK,
    "pipeline/import_checkpoint/gguf_keys": ["tests/pipeline/test_gguf_checks.py"],
    "pipeline/import_checkpoint/gguf_tokenizer": ["tests/pipeline/test_gguf_checks.py"],
    "pipeline/import_checkpoint/dequantise": ["tests/pipeline/test_gguf_checks.py"],
    "pipeline/repack": [
        "tests/pipeline/test_repack.py::test_our_file_has_what_joining_theirs_in_memory_gives",
        "tests/pipeline/test_repack.py::test_their_files_have_what_cutting_ours_in_memory_gives",
        "tests/pipeline/test_repack.py::test_tensors_by_the_hundred_thousand_are_refused_before_their_names_are_listed",
    ],
    "pipeline/pretrain/batches": [
        f"tests/pipeline/test_pretrain_init.py::test_{case}"
        for case in (
            "attention_of_a_step_is_the_annealed_mask_of_that_step",
            "noise_is_on_the_masks_of_the_first_steps_alone",
        )
    ],
    "pipeline/pretrain/engine": GRADIENTS_OF_TWO_RANKS,
    "pipeline/pretrain/routers": GRADIENTS_OF_TWO_RANKS,
    "pipeline/tensor_files": [
        "tests/pipeline/test_tensor_files.py::test_rounding_is_that_of_torch_for_numbers_of_every_kind"
    ],
    "pipeline/hf_config": [
        "tests/pipeline/test_hf_config.py::test_ids_that_are_written_as_none_are_none_whatever_the_class_would_take"
    ],
    "pipeline/export/fit": [
        "tests/pipeline/test_export_refusals.py::"
        "test_a_training_that_the_family_could_not_say_is_refused_when_it_is_planned"
    ],
    "pipeline/export/tokenizer_files": [
        "tests/pipeline/test_export_tokenizer.py::"
        "test_special_tokens_of_a_checkpoint_stay_its_own_whatever_config_json_names"
    ],
    "pipeline/export/hf/diffusion_modules": LOGITS_OF_EXPORTS,
    "pipeline/export/hf/modeling_llada": LOGITS_OF_EXPORTS,
    "pipeline/export/hf/modeling_dream": [
        "tests/pipeline/test_export_generation.py::test_each_family_generates_its_own_way_and_never_causally"
    ],
    "pipeline/export/hf/modeling_lladamoe": LOGITS_OF_EXPORTS,
    "pipeline/export/hf/modeling_llada2_moe": LOGITS_OF_EXPORTS,
    **{f"pipeline/sandbox/{name}": tests for name, tests in SANDBOX.items()},
    "workflows/comparison": [
        f"tests/workflows/test_compare.py::test_{case}"
        for case in (
            "mcnemar_is_that_of_all_outcomes_of_fair_coins",
            "the_mask_noise_of_a_difference_is_that_of_repetitions",
            "differences_are_those_of_the_records_taken_pair_by_pair",
            "questions_that_failed_for_one_of_the_runs_are_left_out",
            "what_is_exact_is_not_compared_with_a_bound",
            "runs_of_other_questions_are_refused_by_name",
        )
    ],
    "pipeline/inference/filling": [
        f"tests/pipeline/test_inference_filling.py::test_{case}"
        for case in (
            "a_change_of_logits_knows_sample_and_position",
            "each_pass_is_heard_of_with_the_rows_of_its_batch",
        )
    ],
    "pipeline/inference/greedy": ["tests/pipeline/test_inference_greedy.py"],
    "pipeline/inference/stops": [
        "tests/pipeline/test_harness_settings.py::test_text_ends_before_the_first_string_that_ends_it"
    ],
    "pipeline/inference/workers": ["tests/pipeline/test_inference_workers.py"],
    "pipeline/harness/config": ["tests/pipeline/test_harness_settings.py"],
    "pipeline/harness/addresses": [
        "tests/pipeline/test_harness.py::test_choices_of_a_document_share_masks_wherever_it_stands"
    ],
    "pipeline/harness/pieces": [
        "tests/pipeline/test_harness.py::test_pieces_of_work_hold_every_request_once_whatever_the_order",
        "tests/pipeline/test_harness.py::test_pieces_count_the_copies_that_there_are",
        "tests/pipeline/test_harness_parity.py::test_what_a_tokenizer_begins_texts_with_stands_before_a_context",
    ],
    "pipeline/harness/generation": [
        "tests/pipeline/test_harness_settings.py::test_length_and_ends_are_those_of_the_task",
        "tests/pipeline/test_harness_evaluate.py::test_text_is_that_of_fill_whatever_the_order",
    ],
}
"""A module of dlm_core, or of another package by its path -> what is run against each of its mutants: the fast tests of
some files, or single ones."""

PLANTED_ONLY = {
    "ar_init",
    "upcycling",
    *(f"pipeline/tasks/{name}" for name in _OF_TASKS),
    "pipeline/inference/model",
    "pipeline/inference/pairs",
    *(f"samplers/{name}" for name in ("blocks", "confident", "contexts", "loop", "planned", "proposal", "quotas")),
    "samplers/guidance",
    "samplers/next_tokens",
    "samplers/padding",
    "samplers/remask",
    "samplers/speculative",
    "pipeline/tokenizer/mask",
    "pipeline/ar_init/run",
    "pipeline/hf_directory",
    "pipeline/import_checkpoint/source",
    "pipeline/import_checkpoint/gguf_keys",
    "pipeline/import_checkpoint/gguf_tokenizer",
    "pipeline/import_checkpoint/dequantise",
    "pipeline/repack",
    "pipeline/pretrain/batches",
    "pipeline/pretrain/engine",
    "pipeline/pretrain/routers",
    "pipeline/tensor_files",
    "pipeline/hf_config",
    "pipeline/export/fit",
    "pipeline/export/tokenizer_files",
    "pipeline/export/hf/diffusion_modules",
    "pipeline/export/hf/modeling_llada",
    "pipeline/export/hf/modeling_dream",
    "pipeline/export/hf/modeling_lladamoe",
    "pipeline/export/hf/modeling_llada2_moe",
    *(f"pipeline/sandbox/{name}" for name in SANDBOX),
    "workflows/comparison",
    *(f"pipeline/inference/{name}" for name in ("filling", "greedy", "stops", "workers")),
    *(f"pipeline/harness/{name}" for name in ("addresses", "config", "generation", "pieces")),
}
"""Modules from which nothing is drawn: a phase of a training, how it begins, exports, what only a gang of ranks shows,
code under test, whole runs: 10 s a mutant."""

DRAWN_FROM: dict[tuple[str, ...], int] = {
    ("schedules", "corruption", "masks", "objectives", "likelihood"): 200,
    (
        "noise",
        "blocks",
        "kernels",
        "cross_entropy",
        "variance",
        "corpus_bound",
        "answer_masks",
        "answers",
        "intervals",
    ): 95,
    (
        "models/config",
        "models/rope",
        "models/attention",
        "models/moe",
        "models/router_losses",
        "models/init",
        "models/transformer",
    ): 140,
}
"""Groups of modules -> how many random mutants are drawn from each: the mathematics, what it rests on, the models.

Those of PLANTED_ONLY are in none.
"""


def source_path(module: str) -> str:
    """The module's file, relative to the root of the repository."""
    return f"{module}.py" if module.startswith(("pipeline/", "workflows/")) else f"dlm_core/{module}.py"

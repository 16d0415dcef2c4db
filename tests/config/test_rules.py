"""Every rule, with a recipe that breaks it and one that is next to it and does not."""

import dataclasses
import re
from pathlib import Path

import pytest
import yaml

from deltatune.config.explain import known_keys
from deltatune.config.idle import BESIDE
from deltatune.config.load import dump_recipe, load_recipe
from deltatune.config.refused import MOVED_TRAINING_NAMES, PASSED_TRAINING_NAMES, REFUSED_TRAINING_NAMES, refusal
from deltatune.config.rules import check_training_names
from deltatune.config.training_section import OWN_TRAINING_NAMES as OURS
from deltatune.config.training_section import TrainingSection
from deltatune.errors import UserError

BASE = {"model": {"name_or_path": "m"}, "data": {"train": [{"path": "a.jsonl"}]}}

EVALUATED = "data: {train: [{path: a}], eval: [{path: b}]}"

# rule -> (broken, what the message must name, mended)
ERRORS = {
    "an_op_has_implementations_by_name": (
        "kernels: {gated_delta_rule: fast}",
        "kernels.gated_delta_rule: unknown impl='fast'; expected 'auto' or one of 'flash_qla', 'fla', 'reference'",
        "kernels: {gated_delta_rule: fla, causal_conv: auto}",
    ),
    "a_prediction_is_made_without_offloading": (
        "{activation_offloading: true, checkpointing: auto}",
        "activation_offloading: true cannot act with checkpointing: auto",
        "{activation_offloading: true, checkpointing: 0.5, compile: true}",
    ),
    "offloading_goes_layer_by_layer": (
        "{activation_offloading: true, compile: {scope: model}}",
        "activation_offloading: true cannot act with compile.scope: model",
        "{activation_offloading: true, compile: true}",
    ),
    "offloading_needs_a_gpu": (
        "{activation_offloading: true, training: {use_cpu: true}}",
        "activation_offloading: true cannot act with training.use_cpu",
        "{activation_offloading: false, training: {use_cpu: true}}",
    ),
    "gathered_weights_are_not_offloaded": (
        "{activation_offloading: true, parallel: {shard: 2}}",
        "parallel.shard: 2: activation_offloading would take gathered weights for activations",
        "{activation_offloading: true, parallel: {replicate: 2}}",
    ),
    "checkpointing_share_needs_compile": (
        "checkpointing: 0.5",
        "set compile: true",
        "{checkpointing: 0.5, compile: true}",
    ),
    "inductor_options_are_known": (
        "compile: {options: {shape_paddin: true}}",
        "did you mean shape_padding?",
        "compile: {options: {shape_padding: true}}",
    ),
    "training_names_can_act": ("training: {gradient_checkpointing: true}", "use checkpointing", "checkpointing: layer"),
    "packs_have_no_lengths_to_order_by": (
        "training: {train_sampling_strategy: batch_rebalance}",
        "choose one of random, sequential",
        "training: {train_sampling_strategy: sequential}",
    ),
    "ranks_read_their_own_packs": (
        "training: {accelerator_config: {dispatch_batches: true}}",
        "training.accelerator_config.dispatch_batches cannot act here: every rank reads its own packs",
        "training: {accelerator_config: {gradient_accumulation_kwargs: {sync_each_batch: true}}}",
    ),
    "evaluations_are_delayed_where_there_are_some": (
        "training: {eval_delay: 3}",
        "training.eval_delay: 3 cannot act without evaluations; set training.eval_strategy",
        f"{{training: {{eval_delay: 3, eval_strategy: steps}}, {EVALUATED}}}",
    ),
    "a_first_evaluation_needs_data": (
        "training: {eval_on_start: true}",
        "training.eval_on_start: true cannot act without data.eval or data.val_size",
        f"{{training: {{eval_on_start: true}}, {EVALUATED}}}",
    ),
    "the_best_is_known_by_what_is_logged": (
        f"{{training: {{metric_for_best_model: accuracy, eval_strategy: steps}}, {EVALUATED}}}",
        "training.metric_for_best_model: accuracy is nothing that an evaluation logs; expected eval_loss",
        f"{{training: {{metric_for_best_model: eval_loss, eval_strategy: steps}}, {EVALUATED}}}",
    ),
    "rewards_are_logged_of_preferences": (
        f"{{training: {{metric_for_best_model: rewards/accuracies, eval_strategy: steps}}, {EVALUATED}}}",
        "rewards/accuracies is nothing that an evaluation logs; expected eval_loss",
        f"{{preference: {{}}, training: {{metric_for_best_model: logps/chosen, eval_strategy: steps}}, {EVALUATED}}}",
    ),
    "something_is_to_be_better": (
        f"{{training: {{greater_is_better: true, eval_strategy: steps}}, {EVALUATED}}}",
        "training.greater_is_better: true cannot act without a best checkpoint",
        f"{{training: {{greater_is_better: true, eval_strategy: steps, load_best_model_at_end: true}}, {EVALUATED}}}",
    ),
    "workers_are_there_to_persist": (
        "training: {dataloader_persistent_workers: true}",
        "cannot act without training.dataloader_num_workers above 0",
        "training: {dataloader_persistent_workers: true, dataloader_num_workers: 1}",
    ),
    "checkpoints_are_there_to_be_pushed": (
        "training: {push_to_hub: true, save_strategy: 'no'}",
        "training.push_to_hub: true cannot act without checkpoints",
        "training: {push_to_hub: true, save_strategy: steps}",
    ),
    "something_is_pushed": (
        "training: {hub_model_id: me/mine}",
        'training.hub_model_id: "me/mine" cannot act without training.push_to_hub',
        "training: {hub_model_id: me/mine, push_to_hub: true}",
    ),
    "what_is_pushed_is_checkpoints": (
        "training: {push_to_hub: true, hub_strategy: end}",
        "training.hub_strategy: end cannot act here",
        "training: {push_to_hub: true, hub_strategy: checkpoint}",
    ),
    "the_optimizer_reads_its_arguments": (
        "training: {optim_args: foo=1}",
        'training.optim_args: "foo=1" cannot act without an optimizer that reads it',
        "training: {optim_args: momentum=0.9, optim: sgd}",
    ),
    "the_optimizer_reads_its_targets": (
        "training: {optim_target_modules: all-linear, optim: sgd}",
        "cannot act without an optimizer that reads it: apollo, galore",
        "training: {optim_target_modules: all-linear, optim: galore_adamw}",
    ),
    "the_recipe_says_how_weights_are_sharded": (
        "training: {fsdp: true}",
        "training.fsdp: true cannot act here; use parallel.shard",
        "parallel: {shard: 2}",
    ),
    "zero_is_sharding": (
        "training: {deepspeed: zero3.json}",
        'training.deepspeed: "zero3.json" cannot act here; use parallel.shard',
        "parallel: {replicate: 2, shard: 2}",
    ),
    "other_axes_are_refused_by_name": (
        "training: {parallelism_config: {cp_size: 2}}",
        "cannot act here; use parallel.shard",
        "parallel: {shard: auto}",
    ),
    "states_are_passed_between_ranks_of_a_pack": (
        "parallel: {recurrent: state, sequence: 1}",
        "parallel.recurrent: state cannot act with parallel.sequence: 1, where every process has packs of its own",
        "parallel: {recurrent: state, sequence: 2}",
    ),
    "room_for_experts_needs_divided_ones": (
        "parallel: {expert_capacity: 2}",
        "parallel.expert_capacity cannot act with parallel.expert: 1",
        "parallel: {expert: 2, expert_capacity: 2}",
    ),
    "weights_in_few_bits_are_frozen": (
        "model: {name_or_path: m, quantization: {type: nf4}}",
        "model.quantization: weights in few bits are frozen, and the recipe has no adapters; add a section lora",
        "{model: {name_or_path: m, quantization: {type: nf4}}, lora: {}}",
    ),
    "dora_reads_wide_weights": (
        "{model: {name_or_path: m, quantization: {type: fp8}}, lora: {use_dora: true}}",
        "lora.use_dora takes the norms of its weights at every step, and the base is in few bits; set it to false",
        "{model: {name_or_path: m, quantization: {type: fp8}}, lora: {use_dora: false}}",
    ),
    "adapters_begin_beside_weights_in_few_bits": (
        "{model: {name_or_path: m, quantization: {}}, lora: {init_lora_weights: pissa_niter_4}}",
        "lora.init_lora_weights: pissa_niter_4 is made of the base weights' numbers, and the base is in few bits",
        "{model: {name_or_path: m, quantization: {}}, lora: {init_lora_weights: gaussian}}",
    ),
    "products_in_fp8_are_of_weights_in_fp8": (
        "{model: {name_or_path: m, quantization: {type: nf4, compute: fp8}}, lora: {}}",
        "model.quantization.compute: fp8 multiplies the codes of weights in fp8, and these are in nf4",
        "{model: {name_or_path: m, quantization: {type: nf4, compute: bf16}}, lora: {}}",
    ),
    "products_in_fp8_have_a_scale_for_each_channel": (
        "{model: {name_or_path: m, quantization: {type: fp8, compute: fp8, blocks: true}}, lora: {}}",
        "model.quantization.blocks: true makes a scale for each 128x128 weights, and products in fp8 take one for each",
        "{model: {name_or_path: m, quantization: {type: fp8, compute: fp8}}, lora: {}}",
    ),
    "adapters_of_experts_are_beside_products_in_fp8": (
        "{model: {name_or_path: m, quantization: {compute: fp8}}, lora: {target_parameters: all-experts, impl: stock}}",
        "lora.impl: stock adds adapters of experts to the values of their weights in every call",
        "{model: {name_or_path: m, quantization: {compute: fp8}}, lora: {target_parameters: all-experts, impl: fused}}",
    ),
    "weights_in_few_bits_are_in_no_shards": (
        "{model: {name_or_path: m, quantization: {}}, lora: {}, parallel: {shard: 2}}",
        "parallel.shard: 2: model.quantization: weights in few bits are not divided among processes yet",
        "{model: {name_or_path: m, quantization: {}}, lora: {}, parallel: {replicate: 2}}",
    ),
    "experts_in_few_bits_are_not_divided": (
        "{model: {name_or_path: m, quantization: {}}, lora: {}, parallel: {expert: 2}}",
        "parallel.expert: 2: model.quantization: weights in few bits are not divided among processes yet",
        "{model: {name_or_path: m, quantization: {}}, lora: {}, parallel: {replicate: 2}}",
    ),
    "experts_are_stepped_element_by_element": (
        "{parallel: {expert: 2}, training: {optim: muon}}",
        "parallel.expert: 2: training.optim: muon needs whole matrices",
        "{parallel: {expert: auto}, training: {optim: muon}}",
    ),
    "shards_are_stepped_element_by_element": (
        "{parallel: {shard: 2}, training: {optim: muon}}",
        "parallel.shard: 2: training.optim: muon needs whole matrices",
        "{parallel: {shard: 2}, training: {optim: adamw_torch}}",
    ),
    "a_scaler_finds_what_one_process_finds": (
        "{parallel: {shard: 2}, training: {fp16: true}}",
        "parallel.shard: 2: training.fp16 scales losses by what one process finds",
        "{parallel: {shard: 2}, training: {bf16: true}}",
    ),
    "samples_have_prompts_to_ask": (
        "{samples: {held_out: 1, chat: false}, data: {train: [{path: x}], val_size: 1}}",
        "samples.chat cannot act without samples.prompts",
        "{samples: {held_out: 1, prompts: [why], chat: false}, data: {train: [{path: x}], val_size: 1}}",
    ),
    "samples_need_whole_weights": (
        "{parallel: {shard: 2}, samples: {held_out: 1}, data: {train: [{path: x}], val_size: 1}}",
        "parallel.shard: 2: samples are completed by one process",
        "{parallel: {shard: 1}, samples: {held_out: 1}, data: {train: [{path: x}], val_size: 1}}",
    ),
    "weights_are_gathered_between_layers": (
        "{parallel: {shard: 2}, compile: {scope: model}}",
        "parallel.shard: 2: compile.scope: model puts all layers into one graph",
        "{parallel: {shard: 2}, compile: {scope: layer}}",
    ),
    "ranks_of_a_pack_hold_equal_parts": (
        "{parallel: {sequence: 3}, packing: {tokens_per_batch: 256}}",
        "packing.tokens_per_batch: 256 is no multiple of parallel.sequence: 3, whose ranks hold equal parts of a pack; "
        "set it to 384, the next such multiple that is whole chunks of the delta rule as well, 64 tokens each",
        "{parallel: {sequence: 3}, packing: {tokens_per_batch: 384}}",
    ),
    "ranks_of_a_pack_lie_within_one_copy_of_the_weights": (
        "parallel: {sequence: 4, shard: 2}",
        "parallel.shard: 2 is neither 1 nor a multiple of parallel.sequence: 4",
        "parallel: {sequence: 2, shard: 4}",
    ),
    "the_tracker_reads_its_settings": (
        "training: {trackio_space_id: me/space, report_to: wandb}",
        "cannot act without training.report_to: trackio",
        "training: {trackio_space_id: me/space, report_to: [wandb, trackio]}",
    ),
    "a_tracker_names_runs": (
        "training: {run_name: mine}",
        'training.run_name: "mine" cannot act without a tracker that names runs; set training.report_to to one of',
        "training: {run_name: mine, report_to: [tensorboard, wandb]}",
    ),
    "not_every_tracker_names_runs": (
        "training: {run_name: mine, report_to: tensorboard}",
        "cannot act without a tracker that names runs",
        "training: {run_name: mine, report_to: all}",
    ),
    "the_optimizer_has_two_moments": (
        "training: {adam_beta1: 0.8, optim: sgd}",
        "training.adam_beta1: 0.8 has no effect with training.optim: sgd; leave one of them out",
        "training: {adam_beta1: 0.8, optim: lion_8bit}",
    ),
    "the_optimizer_has_a_second_moment": (
        "training: {adam_beta2: 0.95, optim: adafactor}",
        "training.adam_beta2: 0.95 has no effect with training.optim: adafactor",
        "training: {adam_beta2: 0.999, optim: adafactor}",
    ),
    "the_optimizer_divides_by_it": (
        "training: {adam_epsilon: 1.0e-6, optim: lion_8bit}",
        "training.adam_epsilon: 1e-06 has no effect with training.optim: lion_8bit",
        "training: {adam_epsilon: 1.0e-6, optim: muon}",
    ),
    "the_schedule_warms_up": (
        "training: {warmup_steps: 5, lr_scheduler_type: constant}",
        "training.warmup_steps: 5 has no effect with training.lr_scheduler_type: constant; leave one of them out",
        "training: {warmup_steps: 5, lr_scheduler_type: constant_with_warmup}",
    ),
    "a_schedule_by_evaluations_does_not_warm_up": (
        f"{{training: {{warmup_steps: 0.1, lr_scheduler_type: greedy, eval_strategy: epoch}}, {EVALUATED}}}",
        "training.warmup_steps: 0.1 has no effect with training.lr_scheduler_type: greedy",
        "training: {warmup_steps: 0.1, lr_scheduler_type: constant, optim: schedule_free_adamw}",
    ),
    "log_lines_come_at_steps": (
        "training: {logging_steps: 5, logging_strategy: epoch}",
        "training.logging_steps: 5 has no effect with training.logging_strategy: epoch; leave one of them out",
        f"{{training: {{logging_steps: 5, logging_strategy: epoch, eval_strategy: steps}}, {EVALUATED}}}",
    ),
    "log_lines_come": (
        f"{{training: {{logging_steps: 5, logging_strategy: 'no', eval_strategy: steps, eval_steps: 2}}, {EVALUATED}}}",
        "training.logging_steps: 5 has no effect with training.logging_strategy: no",
        "training: {logging_first_step: true, logging_strategy: 'no'}",
    ),
    "the_order_has_a_seed": (
        "training: {data_seed: 3, train_sampling_strategy: sequential}",
        "training.data_seed: 3 has no effect with training.train_sampling_strategy: sequential",
        "training: {data_seed: 3, train_sampling_strategy: random}",
    ),
    "a_loss_scaler_skips_by_itself": (
        "training: {on_nonfinite: skip, fp16: true}",
        "training.on_nonfinite: skip cannot act with training.fp16",
        "training: {on_nonfinite: dump, fp16: true}",
    ),
    "an_update_within_the_backward_cannot_be_skipped": (
        "training: {on_nonfinite: skip, optim: adalomo}",
        "since adalomo makes the update within the backward",
        "training: {on_nonfinite: skip, optim: adafactor}",
    ),
    "evaluation_needs_data": (
        "training: {eval_strategy: epoch}",
        "data.eval",
        "{training: {eval_strategy: epoch}, data: {train: [{path: a.jsonl}], eval: [{path: b.jsonl}]}}",
    ),
    "evaluation_may_come_from_the_training_rows": (
        "training: {eval_strategy: epoch}",
        "data.val_size",
        "{training: {eval_strategy: epoch}, data: {train: [{path: a.jsonl}], val_size: 0.1}}",
    ),
    "one_place_for_evaluation_data": (
        "data: {train: [{path: a.jsonl}], eval: [{path: b.jsonl}], val_size: 5}",
        "data.val_size cannot act beside data.eval",
        "data: {train: [{path: a.jsonl}], val_size: 5}",
    ),
    "every_source_has_a_weight_or_none": (
        "data: {train: [{path: a.jsonl, weight: 1}, {path: b.jsonl}]}",
        "data.train.1.weight is missing",
        "data: {train: [{path: a.jsonl, weight: 1}, {path: b.jsonl, weight: 2.5}]}",
    ),
    "weights_are_measured_where_there_are_some": (
        "data: {train: [{path: a.jsonl}], weight_by: documents}",
        "data.weight_by: documents cannot act",
        "data: {train: [{path: a.jsonl, weight: 1}], weight_by: documents}",
    ),
    "evaluation_sees_every_document_once": (
        "data: {train: [{path: a.jsonl}], eval: [{path: b.jsonl, repeat: 2}]}",
        "data.eval.0.repeat cannot act",
        "data: {train: [{path: a.jsonl, repeat: 2}], eval: [{path: b.jsonl}]}",
    ),
    "a_document_fits_a_pack": (
        "{data: {train: [{path: a.jsonl}], max_length: 512}, packing: {tokens_per_batch: 256}}",
        "data.max_length: 512 cannot act above packing.tokens_per_batch: 256",
        "{data: {train: [{path: a.jsonl}], max_length: 256}, packing: {tokens_per_batch: 256}}",
    ),
    "a_stream_has_no_end": (
        "data: {train: [{path: a.jsonl}], streaming: true}",
        "data.streaming needs training.max_steps",
        "{data: {train: [{path: a.jsonl}], streaming: true}, training: {max_steps: 5}}",
    ),
    "a_stream_holds_nothing_out": (
        "{data: {train: [{path: a.jsonl}], streaming: true, val_size: 5}, training: {max_steps: 5}}",
        "data.val_size cannot act with data.streaming",
        "{data: {train: [{path: a.jsonl}], streaming: true, eval: [{path: b.jsonl}]}, training: {max_steps: 5}}",
    ),
    "lengths_of_a_stream_are_not_known": (
        "{data: {train: [{path: a.jsonl, weight: 2}], streaming: true}, training: {max_steps: 5}}",
        "set it to documents",
        "{data: {train: [{path: a.jsonl, weight: 2}], weight_by: documents, streaming: yes}, training: {max_steps: 5}}",
    ),
    "a_stream_repeats_anyway": (
        "{data: {train: [{path: a.jsonl, repeat: 2}], streaming: true}, training: {max_steps: 5}}",
        "data.train.0.repeat cannot act with data.streaming",
        "{data: {train: [{path: a.jsonl}], streaming: true}, training: {max_steps: 5}}",
    ),
    "one_process_reads_a_stream": (
        "{data: {train: [{path: a.jsonl}], streaming: true}, training: {max_steps: 5, dataloader_num_workers: 2}}",
        "training.dataloader_num_workers above 1 cannot act",
        "{data: {train: [{path: a.jsonl}], streaming: true}, training: {max_steps: 5, dataloader_num_workers: 1}}",
    ),
    "steps_need_their_strategy": (
        "training: {save_strategy: epoch, save_steps: 50}",
        "save_strategy",
        "training: {save_strategy: steps, save_steps: 50}",
    ),
    "length_of_training_is_said_once": (
        "training: {max_steps: 10, num_train_epochs: 2}",
        "training.max_steps: 10 makes training.num_train_epochs: 2 meaningless; leave one of them out",
        "training: {max_steps: 10, num_train_epochs: 3}",
    ),
    "max_steps_is_a_count": ("training: {max_steps: 0}", "at least 1", "training: {max_steps: -1}"),
    "one_autocast_dtype": ("training: {bf16: true, fp16: true}", "exclude", "training: {bf16: true}"),
    "loss_scaler_needs_full_precision_weights": (
        "{model: {name_or_path: m, dtype: float16}, training: {fp16: true}}",
        "float32",
        "{model: {name_or_path: m, dtype: float16}, training: {fp16: true}, lora: {}}",
    ),
    "best_checkpoint_needs_evaluation": (
        "training: {load_best_model_at_end: true}",
        "needs evaluations",
        "{training: {load_best_model_at_end: true, eval_strategy: steps}, "
        "data: {train: [{path: a}], eval: [{path: b}]}}",
    ),
    "the_best_model_is_of_a_checkpoint": (
        "{training: {load_best_model_at_end: true, eval_strategy: steps, save_strategy: epoch}, " + EVALUATED + "}",
        "set both to the same, or save_strategy to best",
        "{training: {load_best_model_at_end: true, eval_strategy: epoch, save_strategy: best}, " + EVALUATED + "}",
    ),
    "every_checkpoint_is_evaluated": (
        "{training: {load_best_model_at_end: true, eval_strategy: steps, eval_steps: 2, save_steps: 5}, "
        + EVALUATED
        + "}",
        "save_steps: 5 and eval_steps: 2: set save_steps to a multiple of eval_steps",
        "{training: {load_best_model_at_end: true, eval_strategy: steps, eval_steps: 0.1, save_steps: 0.3}, "
        + EVALUATED
        + "}",
    ),
    "shares_of_steps_are_compared_with_shares": (
        "{training: {load_best_model_at_end: true, eval_strategy: steps, eval_steps: 0.5, save_steps: 5}, "
        + EVALUATED
        + "}",
        "set save_steps to a multiple of eval_steps",
        "{training: {load_best_model_at_end: true, eval_strategy: steps, eval_steps: 5, save_steps: 5}, "
        + EVALUATED
        + "}",
    ),
    "a_schedule_by_evaluations_has_some": (
        "training: {lr_scheduler_type: reduce_lr_on_plateau}",
        "reduce_lr_on_plateau follows evaluations",
        "{training: {lr_scheduler_type: reduce_lr_on_plateau, eval_strategy: steps}, " + EVALUATED + "}",
    ),
    "the_cache_is_emptied_at_whole_steps": (
        "training: {torch_empty_cache_steps: 0}",
        "torch_empty_cache_steps must be a whole number above 0; got 0",
        "training: {torch_empty_cache_steps: 2}",
    ),
    "a_loss_scaler_needs_a_gpu": (
        "training: {fp16: true, use_cpu: true}",
        "training.fp16 needs a GPU",
        "training: {fp16: true}",
    ),
    "batches_are_made_ahead_by_whole_numbers": (
        "training: {dataloader_prefetch_factor: 0, dataloader_num_workers: 1}",
        "training.dataloader_prefetch_factor must be a whole number above 0; got 0",
        "training: {dataloader_prefetch_factor: 1, dataloader_num_workers: 1}",
    ),
    **{
        f"{key}_is_an_expression": (
            yaml.safe_dump({section: {name: broken}}),
            f"{key}: '(' is no regular expression: missing )",
            yaml.safe_dump({section: {name: mended}}),
        )
        for key, broken, mended in (
            ("training.learning_rates", {"(": 1e-4}, {"()": 1e-4}),
            ("training.unfrozen_parameters", ["("], ["()"]),
            ("lora.rank_pattern", {"(": 2}, {"()": 2}),
            ("lora.alpha_pattern", {"(": 2}, {"()": 2}),
            ("lora.target_modules", "(", ["("]),
            ("lora.exclude_modules", "(", ["("]),
        )
        for section, name in (key.split("."),)
    },
    "one_product_drops_nothing_out": (
        "lora: {lora_dropout: 0.1, impl: fused}",
        "lora.lora_dropout cannot run in lora.impl: fused; set lora.impl to auto or stock",
        "lora: {lora_dropout: 0.1, impl: stock}",
    ),
    "dora_runs_on_stock_layers": (
        "lora: {use_dora: true, impl: fused}",
        "lora.impl",
        "lora: {use_dora: true, impl: stock}",
    ),
    "chat_settings_need_chat_data": (
        "data: {train: [{path: a, format: text}], train_on: last}",
        "data.train_on",
        "data: {train: [{path: a, format: text}, {path: b, format: chat}], train_on: last}",
    ),
    "columns_fit_the_format": (
        "data: {train: [{path: a, format: chat, columns: {text: body}}]}",
        "data.train.0.columns.text",
        "data: {train: [{path: a, format: text, columns: {text: body}}]}",
    ),
    "roles_need_messages": (
        "data: {train: [{path: a, format: alpaca}], roles: {bot: assistant}}",
        "data.roles cannot act",
        "data: {train: [{path: a, format: alpaca}, {path: b}], roles: {bot: assistant}}",
    ),
    "message_fields_need_messages": (
        "data: {train: [{path: a, format: text, message_fields: {role: speaker}}]}",
        "data.train.0.message_fields cannot act with format: text",
        "data: {train: [{path: a, format: prompt_completion, message_fields: {role: speaker}}]}",
    ),
    "tokens_have_no_turns": (
        "data: {train: [{path: a, format: tokens}], train_on: last}",
        "data.train_on",
        "data: {train: [{path: a, format: tokens}, {path: b, format: alpaca}], train_on: last}",
    ),
    "hub_settings_need_the_hub": (
        "data: {train: [{path: a.jsonl, split: test}]}",
        "data.train.0.split",
        "data: {train: [{path: owner/a, split: test}]}",
    ),
    "pairs_need_a_preference_section": (
        "data: {train: [{path: a, format: preference}]}",
        "add preference: {}, which is DPO",
        "{data: {train: [{path: a, format: preference}]}, preference: {}}",
    ),
    "preference_needs_pairs": (
        "{data: {train: [{path: a, format: preference}, {path: b, format: chat}]}, preference: {}}",
        "needs pairs in every source",
        "{data: {train: [{path: a, format: preference}, {path: b}]}, preference: {}}",
    ),
    "gamma_is_the_margin_of_simpo": (
        "preference: {gamma: 0.5}",
        "preference.gamma cannot act with preference.loss: dpo",
        "preference: {gamma: 0.5, loss: simpo}",
    ),
    "label_smoothing_is_for_dpo": (
        "preference: {label_smoothing: 0.1, loss: orpo}",
        "preference.label_smoothing cannot act with preference.loss: orpo",
        "preference: {label_smoothing: 0.1}",
    ),
    "pairs_are_not_streamed": (
        "{data: {train: [{path: a}], streaming: true}, training: {max_steps: 5}, preference: {}}",
        "data.streaming cannot act with preference",
        "{data: {train: [{path: a}], streaming: true}, training: {max_steps: 5}}",
    ),
    "pairs_are_not_split": (
        "{data: {train: [{path: a}], overlong: split}, preference: {}}",
        "data.overlong: split cannot act with preference",
        "{data: {train: [{path: a}], overlong: truncate}, preference: {}}",
    ),
    "answers_alone_are_compared": (
        "{data: {train: [{path: a}], train_on: all}, preference: {}}",
        "data.train_on must be assistant or last",
        "{data: {train: [{path: a}], train_on: last}, preference: {}}",
    ),
    "probe_settings_need_the_probe": (
        "verify: {enabled: false, lengths: [3, 4]}",
        "verify.lengths",
        "verify: {lengths: [3, 4]}",
    ),
}
WARNINGS = {
    "a_revision_is_of_the_hub": (
        f"model: {{name_or_path: {Path(__file__).parent}, revision: main}}",
        "model.revision: main does nothing beside",
        "model: {name_or_path: owner/model, revision: main}",
    ),
    "cudagraphs_copy_boundaries": (
        "compile: {options: {triton.cudagraphs: true}}",
        "boundaries",
        "compile: {options: {triton.cudagraphs: false}}",
    ),
    "search_directions_need_the_search": (
        "compile: {options: {coordinate_descent_check_all_directions: true}}",
        "coordinate_descent_tuning",
        "compile: {options: {coordinate_descent_check_all_directions: true, coordinate_descent_tuning: true}}",
    ),
    "packs_fill_whole_chunks": (
        "packing: {tokens_per_batch: 1000}",
        "multiple of 64",
        "packing: {tokens_per_batch: 1024}",
    ),
    "low_precision_weights_train_in_place": (
        "model: {name_or_path: m, dtype: bfloat16}",
        "float32",
        "{model: {name_or_path: m, dtype: bfloat16}, lora: {}}",
    ),
    "evaluation_data_is_held_out": (
        "{training: {eval_strategy: steps}, data: {train: [{path: a}], eval: [{path: a}]}}",
        "not held out",
        "{training: {eval_strategy: steps}, data: {train: [{path: a}], eval: [{path: a, split: test}]}}",
    ),
}


def recipe_file(folder: Path, change: str) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(BASE | yaml.safe_load(change)))
    return path


@pytest.mark.parametrize(("broken", "named", "mended"), ERRORS.values(), ids=ERRORS)
def test_a_broken_rule_stops_the_recipe(broken, named, mended, tmp_path) -> None:
    with pytest.raises(UserError, match=r"recipe\.yaml") as caught:
        load_recipe(recipe_file(tmp_path, broken))
    assert named in str(caught.value)
    assert "\n" not in str(caught.value)
    assert load_recipe(recipe_file(tmp_path, mended)).warnings == []


@pytest.mark.parametrize(
    ("setting", "plain"),
    [("name: all", "name=null"), ("split: test", "split=null"), ("revision: main", "revision=null")],
)
def test_a_file_in_place_of_a_data_set_says_what_to_set(setting, plain, tmp_path) -> None:
    path = recipe_file(tmp_path, f"data: {{train: [{{path: owner/a, {setting}}}]}}")
    here = "data.train.0.path=mine.jsonl"
    with pytest.raises(UserError) as caught:
        load_recipe(path, [here])
    remedy = f"data.train.0.{plain}"
    assert f"leave it out; for this run alone: --set {remedy} ({path}:" in str(caught.value)
    assert load_recipe(path, [here, remedy]).recipe.data.train[0].path == "mine.jsonl"


# what a file says and an override clashes with -> what is to be passed besides; VALUE where no default ends it
CLASHES = {
    "checkpointing: 0.5\ncompile: true": ("compile=false", ["checkpointing=none"]),
    "compile: {scope: layer}\nactivation_offloading: true": ("compile.scope=model", ["activation_offloading=false"]),
    "training: {max_steps: 10}": ("training.num_train_epochs=2", ["training.max_steps=-1"]),
    "training: {save_strategy: epoch}": ("training.save_steps=50", ["training.save_strategy=steps"]),
    "training: {bf16: true}": ("training.fp16=true", ["training.bf16=false"]),
    "lora: {lora_dropout: 0.1}": ("lora.impl=fused", ["lora.lora_dropout=0.0"]),
    "packing: {tokens_per_batch: 256}": ("parallel.sequence=3", ["packing.tokens_per_batch=VALUE"]),
    "data: {train: [{path: a, weight: 2}], eval: [{path: b}]}\ntraining: {eval_strategy: steps}": (
        "data.val_size=5",
        ["data.eval=[]"],
    ),
    "training: {push_to_hub: true}": ("training.save_strategy=no", ["training.push_to_hub=VALUE"]),
    "parallel: {shard: 2}": ("training.optim=muon", ["parallel.shard=auto"]),
}


@pytest.mark.parametrize(("file", "override", "remedies"), [(file, *rest) for file, rest in CLASHES.items()])
def test_a_clash_with_an_override_says_what_else_to_set(file, override, remedies, tmp_path) -> None:
    path = recipe_file(tmp_path, file)
    load_recipe(path)
    with pytest.raises(UserError) as caught:
        load_recipe(path, [override])
    lines = path.read_text().split("\n")
    offered = re.findall(r"--set (\S+) \((\S+):(\d+)\)", str(caught.value).partition("; for this run alone: ")[2])
    assert [setting for setting, _, _ in offered] == remedies
    for setting, name, line in offered:
        key, _, value = setting.partition("=")
        assert name == str(path)
        assert lines[int(line) - 1].strip().startswith(f"{key.rpartition('.')[2]}:")
        if value != "VALUE":
            load_recipe(path, [override, setting])


def test_a_clash_of_the_file_alone_names_no_override(tmp_path) -> None:
    with pytest.raises(UserError) as caught:
        load_recipe(recipe_file(tmp_path, "checkpointing: 0.5"))
    assert "--set" not in str(caught.value)


def test_overrides_that_clash_with_each_other_alone_are_left_to_their_error(tmp_path) -> None:
    with pytest.raises(UserError) as caught:
        load_recipe(recipe_file(tmp_path, "{}"), ["checkpointing=0.5", "compile=false"])
    assert str(caught.value).endswith("set compile: true, or checkpointing to none, layer or auto")


@pytest.mark.parametrize(("broken", "named", "mended"), WARNINGS.values(), ids=WARNINGS)
def test_a_warning_is_given_and_goes_away(broken, named, mended, tmp_path) -> None:
    (warning,) = load_recipe(recipe_file(tmp_path, broken)).warnings
    assert named in warning
    assert load_recipe(recipe_file(tmp_path, mended)).warnings == []


def test_all_broken_rules_are_named_at_once(tmp_path) -> None:
    with pytest.raises(UserError) as caught:
        load_recipe(recipe_file(tmp_path, "{checkpointing: 0.5, training: {eval_strategy: steps, max_steps: 0}}"))
    assert all(name in str(caught.value) for name in ("checkpointing", "data.eval", "max_steps"))


@pytest.mark.parametrize("name", sorted(REFUSED_TRAINING_NAMES))
def test_refused_names_say_what_to_do_instead(name) -> None:
    accepted, remedy = REFUSED_TRAINING_NAMES[name]
    assert refusal(name, object()) == remedy
    if accepted is not None:
        assert refusal(name, accepted) is None


def test_accepted_names_are_accepted() -> None:
    assert refusal("per_device_train_batch_size", 1) is None
    assert refusal("per_device_train_batch_size", 8) is not None
    assert refusal("learning_rate", None) is None


@pytest.fixture(scope="module")
def transformers_names() -> set[str]:
    from transformers import TrainingArguments

    return {field.name for field in dataclasses.fields(TrainingArguments)}


def test_the_sections_own_names_are_transformers_names(transformers_names) -> None:
    assert set(TrainingSection.model_fields) - transformers_names == OURS


def test_every_name_of_transformers_is_in_one_class(transformers_names) -> None:
    """Passed on, set by the recipe under another key, or refused with the reason."""
    passed = (set(TrainingSection.model_fields) - OURS) | PASSED_TRAINING_NAMES
    refused = set(REFUSED_TRAINING_NAMES) - MOVED_TRAINING_NAMES
    classes = [passed, MOVED_TRAINING_NAMES, refused]
    for name in sorted(transformers_names):
        assert sum(name in names for names in classes) == 1, name
    assert passed <= transformers_names
    for name in MOVED_TRAINING_NAMES:
        key = re.search(r"use (?:deltatune train )?(--resume|[\w.]+)", REFUSED_TRAINING_NAMES[name][1])
        assert key is not None, name
        assert key[1] == "--resume" or names_a_setting(key[1]), name


def names_a_setting(key: str) -> bool:
    section, _, name = key.partition(".")
    return name in known_keys([section]) if name else section in known_keys([])


# in rules of config.rules and config.moments, or they act whatever the others say
BESIDE_ELSEWHERE = {"eval_steps", "save_steps", "max_steps", "num_train_epochs", "load_best_model_at_end"}
# of one process or device; recipes are for any number of them
OF_MACHINES = {
    "ddp_backend", "ddp_broadcast_buffers", "ddp_bucket_cap_mb", "ddp_find_unused_parameters", "ddp_static_graph",
    "ddp_timeout", "log_level_replica", "log_on_each_node", "save_on_each_node", "use_cpu", "dataloader_pin_memory",
    "tf32", "torch_empty_cache_steps", "accelerator_config",
}  # fmt: skip
# what a short run turns off (save_strategy: no) leaves these on purpose
SWITCHED_OFF = {"save_total_limit", "save_only_model"}
BY_THEMSELVES = {
    "bf16", "dataloader_drop_last", "dataloader_num_workers", "disable_tqdm", "eval_strategy", "fp16",
    "full_determinism", "gradient_accumulation_steps", "include_num_input_tokens_seen", "learning_rate", "log_level",
    "logging_first_step", "logging_strategy", "lr_scheduler_kwargs", "lr_scheduler_type", "max_grad_norm", "optim",
    "output_dir", "report_to", "save_strategy", "seed", "skip_memory_metrics", "train_sampling_strategy",
    "weight_decay",
}  # fmt: skip


def test_every_name_that_is_passed_on_acts_by_itself_or_is_held_against_another() -> None:
    classes = [BESIDE, BESIDE_ELSEWHERE, OF_MACHINES, SWITCHED_OFF, BY_THEMSELVES]
    for name in sorted((set(TrainingSection.model_fields) - OURS) | PASSED_TRAINING_NAMES):
        assert sum(name in names for names in classes) == 1, name


SHORT_RUN = {
    "save_strategy=no": "save_steps: 5, save_total_limit: 2, save_only_model: true",
    "eval_strategy=no": "eval_strategy: steps, eval_steps: 5, eval_delay: 2, metric_for_best_model: loss",
    "report_to=none": "report_to: trackio, run_name: mine, project: ours, trackio_space_id: me/space",
    "report_to=[]": "report_to: [trackio], run_name: mine",
    "push_to_hub=false": "push_to_hub: true, hub_strategy: end, hub_model_id: me/mine, hub_private_repo: true",
    "dataloader_num_workers=0": "dataloader_num_workers: 2, dataloader_prefetch_factor: 3",
}


@pytest.mark.parametrize(("switch", "settings"), SHORT_RUN.items(), ids=SHORT_RUN)
def test_a_short_run_turns_things_off_on_purpose(switch, settings, tmp_path) -> None:
    path = recipe_file(tmp_path, f"{{training: {{{settings}}}, {EVALUATED}}}")
    recipe = load_recipe(path, [f"training.{switch}"]).recipe
    path.write_text(dump_recipe(recipe))
    assert load_recipe(path).recipe == recipe


def test_a_name_of_a_newer_transformers_is_not_passed_on_unseen(transformers_names) -> None:
    training = TrainingSection.model_validate({"shiny": True})
    with pytest.raises(UserError, match=r"training\.shiny is newer than this deltatune, .*; leave it out"):
        check_training_names(training, {*transformers_names, "shiny"})


def test_defaults_are_transformers_defaults(transformers_names) -> None:
    from transformers import TrainingArguments

    theirs = {field.name: field.default for field in dataclasses.fields(TrainingArguments)}
    ours = TrainingSection().model_dump(exclude=OURS)
    differing = {name for name, value in ours.items() if value != theirs[name]}
    assert differing == {"output_dir", "logging_steps"}


def test_other_names_must_be_transformers_names(transformers_names) -> None:
    check_training_names(
        TrainingSection.model_validate({"adam_beta1": 0.8, "torch_empty_cache_steps": 4}), transformers_names
    )
    with pytest.raises(UserError, match=r"training.adam_bta1: unknown \(did you mean adam_beta1\?\)"):
        check_training_names(TrainingSection.model_validate({"adam_bta1": 0.8}), transformers_names)
    with pytest.raises(UserError, match=r"training.lr: unknown \(did you mean learning_rate\?\)"):
        check_training_names(TrainingSection.model_validate({"lr": 0.8}), transformers_names)

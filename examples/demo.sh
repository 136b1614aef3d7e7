#!/usr/bin/env bash
# The whole way on two CPU cores, on text that every machine has: prepare, compile, train on two processes, merge, load, generate.
# Everything lands in demo_output/. Run it with `make demo`, or with the environment active: bash examples/demo.sh
set -euo pipefail
cd "$(dirname "$0")/.."
out=demo_output
mkdir -p "$out"
rm -rf "$out"/{programs,checkpoints,runs,merged.ckpt,merged_hf}
export OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=true
run() { echo; echo "\$ $*"; "$@"; }

run python bookcorpus.py --data_path_or_name stdlib --tokenizer_path_or_name train:4096 --save_path $out/stdlib_1K --sequence_length 1024 --validation 0.02 --overwrite

run python create_mini_model.py --model_id llama3_8b --output_id $out/llama3_mini --dataset_path $out/stdlib_1K \
  --hidden_size 256 --intermediate_size 688 --num_attention_heads 8 --num_key_value_heads 4 --overwrite

flags=(--name demo --model_id $out/llama3_mini --dataset_path $out/stdlib_1K --plan_ngpus 2 --runtime_ngpus 2 --hardware cpu
  --precision fp32 --grad_accumulation_steps 1 --output_folder $out/programs)

run python train.py --run_mode compile "${flags[@]}"

run torchrun --nproc_per_node=2 train.py "${flags[@]}" --max_train_steps 400 --lr 1e-3 --warmup_steps 20 --lr_schedule linear \
  --checkpoint_every 200 --eval_every 100 --eval_rows 64 --checkpoint_dir $out/checkpoints --log_dir $out/runs

run python ckpt_merger.py --ckpt_dir $out/checkpoints --output_fname $out/merged.ckpt --hf_output $out/merged_hf --dtype float32

run python examples/check_merged.py --merged $out/merged_hf --dataset_path $out/stdlib_1K --final $out/runs/demo/final.json

run python -m seqloom generate --model $out/merged_hf --prompt "def read(self, path):" --max_new_tokens 80

echo
echo "the run's page is $out/runs/demo/report.html, the plan's page $out/programs/demo/plan.html"

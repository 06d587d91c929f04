#!/bin/sh
# Trains a small GPT on the source of Python's standard library and a small GLM on the order of the chemical elements,
# and lets them write: three minutes on two recent CPU cores, five on older ones. Every line after a $ is a command that
# you can type.
set -eu

run() {
    printf '\n$ garrulax'
    for word in "$@"; do
        case $word in
            *[!A-Za-z0-9_./=+-]*) printf " '%s'" "$word" ;;
            *) printf ' %s' "$word" ;;
        esac
    done
    printf '\n'
    garrulax "$@"
}

say() {
    printf '\n== %s\n' "$*"
}

fresh() { # the name of a new folder, so that earlier runs are kept
    folder=$1
    number=2
    while [ -e "$folder" ]; do
        folder="$1-$number"
        number=$((number + 1))
    done
    echo "$folder"
}

gpt=$(fresh runs/quickstart-gpt)
glm=$(fresh runs/quickstart-glm)
elements=$(fresh runs/elements.txt)

say "1. A GPT-2 of 1.3 million parameters learns to continue Python code (about ninety seconds)."
echo "   The text is the source of Python's standard library. A tokenizer is trained first. Bits/byte say how well the"
echo "   model compresses text it was not trained on; xz is printed for comparison. Ctrl-C saves and stops."
run train gpt2-tiny steps=1100 eval_every=550 --run "$gpt"

say "2. It completes a function definition. The same seed gives the same text."
run generate "$gpt" 'def read_file(path, encoding=' --max-new-tokens 80 --temperature 0.6 --seed 1

say "3. A smaller GLM learns the order of the chemical elements by heart, by filling blanks (about one minute)."
printf '\n$ python examples/elements.py > %s\n' "$elements"
mkdir -p runs
python "$(dirname "$0")/elements.py" > "$elements"
tail -n 2 "$elements"
run train glm-tiny corpus="$elements" vocab=512 model.layers=2 batch=24 window=32 steps=1000 eval_every=500 \
    token_blanks=0.7 sentence_blanks=0 document_blanks=0.3 --run "$glm"

say "4. It reads the text before and after each blank and fills in what is missing."
run fill "$glm" 'Iron, symbol [MASK], comes after [MASK] and before [MASK].' --temperature 0
run fill "$glm" 'Sodium, symbol Na, comes after [MASK] and before [MASK].' --temperature 0

say "Done."
cat <<EOF
The results
  $gpt/model      the trained model in Hugging Face layout: config.json, safetensors, tokenizer
  $gpt/loss.png   its loss curves; metrics.jsonl has the numbers, events/ is for TensorBoard
Next commands to try
  garrulax info gpt2-tiny                                  the model's configuration, parameters, memory and FLOPs
  garrulax train --list                                    every setting, its default and its meaning
  garrulax train llama-tiny corpus=YOUR_FOLDER --run runs/mine   another family on your own text
  garrulax generate $gpt 'class Stack:' --temperature 0.8
  garrulax fill $glm 'Copper, symbol Cu, comes after [MASK] and before [MASK].' --temperature 0
  python examples/research_loop.py                         a custom training loop in 40 lines
EOF

"""The JSON-Schema-Test-Suite against `constrain.json_schema`: no document may be allowed that its schema forbids.

    python benchmarks/json_suite.py path/to/JSON-Schema-Test-Suite/tests/draft2020-12

The suite is at github.com/json-schema-org/JSON-Schema-Test-Suite. Each of its documents is written as `json.dumps`
writes it and is fed to the grammar of its schema byte by byte. Printed are the numbers of documents that are

    refused      the schema has a keyword that is not supported, and an error says so
    right        allowed and valid, or forbidden and invalid
    incomplete   valid, but never written (such as properties in another order)
    unsound      invalid, but allowed: there must be none
"""

import argparse
import collections
import json
import sys
from pathlib import Path

from garrulax.hub.tokenizers import ByteTokenizer
from garrulax.sampling import constrain

BYTES = ByteTokenizer()
PLENTY = 1_000_000  # tokens


def allows(grammar, data):
    """Whether a document, as json.dumps writes it, is a text of the grammar."""
    matcher = grammar.matcher(PLENTY)
    try:
        return all(map(matcher.accept, [*BYTES.encode(json.dumps(data, ensure_ascii=False)), BYTES.eos]))
    except ValueError:
        return False


def judge(schema, tests):
    """Pairs of a verdict and a test. Of a refused schema, the error in place of the test."""
    try:
        grammar = constrain.json_schema(schema).bind(BYTES, BYTES.vocab, (BYTES.eos,))
    except ValueError as error:
        return [("refused", str(error)) for _ in tests]
    verdicts = {(True, True): "right", (False, False): "right", (False, True): "incomplete", (True, False): "unsound"}
    return [(verdicts[allows(grammar, test["data"]), test["valid"]], test) for test in tests]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--reasons", action="store_true", help="print why schemas are refused, and how often")
    parser.add_argument("--list", help="print the documents with this verdict")
    arguments = parser.parse_args()
    files = sorted(arguments.folder.glob("*.json"))
    if not files:
        parser.error(f"there are no JSON files in {arguments.folder}")
    counts, schemas, reasons = collections.Counter(), 0, collections.Counter()
    for file in files:
        for group in json.loads(file.read_text(encoding="utf-8")):
            schemas += 1
            for verdict, test in judge(group["schema"], group["tests"]):
                counts[verdict] += 1
                if verdict == "refused":
                    reasons[test] += 1
                elif verdict in ("unsound", arguments.list):
                    print(f"{verdict}: {file.name}: {group['description']}: {test['description']}")
    print(f"{schemas} schemas, {sum(counts.values())} documents: ", end="")
    print(", ".join(f"{counts[name]} {name}" for name in ("refused", "right", "incomplete", "unsound")))
    if arguments.reasons:
        for reason, count in reasons.most_common():
            print(f"{count:5} {reason}")
    return 1 if counts["unsound"] else 0


if __name__ == "__main__":
    sys.exit(main())

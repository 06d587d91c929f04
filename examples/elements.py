"""Writes the order of the first 54 chemical elements as text, which a small model can learn by heart.

    python examples/elements.py > elements.txt

Every element has a sentence, such as "Iron, symbol Fe, comes after manganese and before cobalt."; the text has all of
them twenty times, each time in another order.
"""

import random

ELEMENTS = """
H hydrogen He helium Li lithium Be beryllium B boron C carbon N nitrogen O oxygen F fluorine Ne neon Na sodium
Mg magnesium Al aluminium Si silicon P phosphorus S sulfur Cl chlorine Ar argon K potassium Ca calcium Sc scandium
Ti titanium V vanadium Cr chromium Mn manganese Fe iron Co cobalt Ni nickel Cu copper Zn zinc Ga gallium Ge germanium
As arsenic Se selenium Br bromine Kr krypton Rb rubidium Sr strontium Y yttrium Zr zirconium Nb niobium Mo molybdenum
Tc technetium Ru ruthenium Rh rhodium Pd palladium Ag silver Cd cadmium In indium Sn tin Sb antimony Te tellurium
I iodine Xe xenon
""".split()  # noqa: SIM905 (a hundred quoted words would be harder to read)


def sentences() -> list[str]:
    """A sentence about every element that has two neighbours."""
    symbols, names = ELEMENTS[::2], ELEMENTS[1::2]
    return [
        f"{names[i].capitalize()}, symbol {symbols[i]}, comes after {names[i - 1]} and before {names[i + 1]}."
        for i in range(1, len(names) - 1)
    ]


def main() -> None:
    """Prints the text; it is the same every time."""
    lines, order = sentences(), random.Random(0)
    for _ in range(20):
        order.shuffle(lines)
        print(*lines, sep="\n")


if __name__ == "__main__":
    main()

"""Sixteen problems of our own in HumanEval's form: a signature with its docstring, a body that solves it, its tests."""

PROBLEMS: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    (
        'def count_vowels(text):\n    """How many letters of text are vowels (a, e, i, o, u), small or capital."""\n',
        "    return sum(letter in 'aeiou' for letter in text.lower())\n",
        ("assert count_vowels('') == 0", "assert count_vowels('Queue') == 4", "assert count_vowels('RHYTHM') == 0"),
    ),
    (
        'def second_largest(numbers):\n    """The second largest distinct value of a list, or None."""\n',
        "    values = sorted(set(numbers))\n    return values[-2] if len(values) > 1 else None\n",
        (
            "assert second_largest([3, 1, 2]) == 2",
            "assert second_largest([5, 5, 4]) == 4",
            "assert second_largest([7, 7]) is None",
            "assert second_largest([-1, -2]) == -2",
        ),
    ),
    (
        'def run_lengths(text):\n    """Each run of equal characters as (character, length), in order."""\n',
        "    runs = []\n"
        "    for letter in text:\n"
        "        if runs and runs[-1][0] == letter:\n"
        "            runs[-1] = (letter, runs[-1][1] + 1)\n"
        "        else:\n"
        "            runs.append((letter, 1))\n"
        "    return runs\n",
        (
            "assert run_lengths('') == []",
            "assert run_lengths('aab') == [('a', 2), ('b', 1)]",
            "assert run_lengths('aba') == [('a', 1), ('b', 1), ('a', 1)]",
        ),
    ),
    (
        'def is_leap_year(year):\n    """Whether a year of the Gregorian calendar has 366 days."""\n',
        "    return year % 4 == 0 and (year % 100 != 0 or year % 400 == 0)\n",
        (
            "assert is_leap_year(2024) and is_leap_year(2000)",
            "assert not is_leap_year(1900)",
            "assert not is_leap_year(2023)",
        ),
    ),
    (
        'def rotated(items, k):\n    """The list with its last k items moved to the front; k may be large."""\n',
        "    at = len(items) - k % len(items) if items else 0\n    return items[at:] + items[:at]\n",
        (
            "assert rotated([1, 2, 3, 4], 1) == [4, 1, 2, 3]",
            "assert rotated([1, 2, 3], 7) == [3, 1, 2]",
            "assert rotated([1, 2], 0) == [1, 2]",
            "assert rotated([], 3) == []",
        ),
    ),
    (
        'def digit_product(n):\n    """The product of the decimal digits of a whole number, its sign aside."""\n',
        "    product = 1\n    for digit in str(abs(n)):\n        product *= int(digit)\n    return product\n",
        ("assert digit_product(234) == 24", "assert digit_product(-15) == 5", "assert digit_product(105) == 0"),
    ),
    (
        'def is_balanced(text):\n    """Whether the brackets ()[]{} in text open and close in the right order."""\n',
        "    partner = {')': '(', ']': '[', '}': '{'}\n"
        "    waiting = []\n"
        "    for mark in text:\n"
        "        if mark in '([{':\n"
        "            waiting.append(mark)\n"
        "        elif mark in partner and (not waiting or waiting.pop() != partner[mark]):\n"
        "            return False\n"
        "    return not waiting\n",
        (
            "assert is_balanced('(a[b]{c})')",
            "assert not is_balanced('(]')",
            "assert not is_balanced('((')",
            "assert not is_balanced(')(')",
            "assert is_balanced('')",
        ),
    ),
    (
        "def merged(intervals):\n"
        '    """Overlapping or touching closed intervals [low, high] joined, in ascending order."""\n',
        "    joined = []\n"
        "    for low, high in sorted(intervals):\n"
        "        if joined and low <= joined[-1][1]:\n"
        "            joined[-1][1] = max(joined[-1][1], high)\n"
        "        else:\n"
        "            joined.append([low, high])\n"
        "    return joined\n",
        (
            "assert merged([[5, 6], [1, 3], [2, 4]]) == [[1, 4], [5, 6]]",
            "assert merged([[1, 2], [2, 3]]) == [[1, 3]]",
            "assert merged([[1, 9], [2, 3]]) == [[1, 9]]",
            "assert merged([]) == []",
        ),
    ),
    (
        "def shifted(text, k):\n"
        '    """Each letter moved k places on in the alphabet, from z on to a; all else stays."""\n',
        "    moved = ''\n"
        "    for letter in text:\n"
        "        if 'a' <= letter <= 'z':\n"
        "            moved += chr((ord(letter) - 97 + k) % 26 + 97)\n"
        "        elif 'A' <= letter <= 'Z':\n"
        "            moved += chr((ord(letter) - 65 + k) % 26 + 65)\n"
        "        else:\n"
        "            moved += letter\n"
        "    return moved\n",
        (
            "assert shifted('xyz', 3) == 'abc'",
            "assert shifted('Hi, you!', 1) == 'Ij, zpv!'",
            "assert shifted('abc', -1) == 'zab'",
        ),
    ),
    (
        'def transposed(rows):\n    """Columns of a rectangular table as a list of lists."""\n',
        "    return [list(column) for column in zip(*rows)]\n",
        ("assert transposed([[1, 2, 3], [4, 5, 6]]) == [[1, 4], [2, 5], [3, 6]]", "assert transposed([]) == []"),
    ),
    (
        'def primes_below(n):\n    """All primes smaller than n, in ascending order."""\n',
        "    return [p for p in range(2, n) if all(p % d for d in range(2, int(p ** 0.5) + 1))]\n",
        (
            "assert primes_below(2) == []",
            "assert primes_below(12) == [2, 3, 5, 7, 11]",
            "assert 25 not in primes_below(30) and 29 in primes_below(30)",
        ),
    ),
    (
        'def longest_word(text):\n    """The first of the longest words of text; words are parted by white space."""\n',
        "    return max(text.split(), key=len, default='')\n",
        (
            "assert longest_word('a bee sees') == 'sees'",
            "assert longest_word('one two') == 'one'",
            "assert longest_word('  ') == ''",
        ),
    ),
    (
        'def roman(n):\n    """A whole number from 1 to 3999 in Roman numerals."""\n',
        "    signs = [(1000, 'M'), (900, 'CM'), (500, 'D'), (400, 'CD'), (100, 'C'), (90, 'XC'), (50, 'L')]\n"
        "    signs += [(40, 'XL'), (10, 'X'), (9, 'IX'), (5, 'V'), (4, 'IV'), (1, 'I')]\n"
        "    text = ''\n"
        "    for value, sign in signs:\n"
        "        text += sign * (n // value)\n"
        "        n %= value\n"
        "    return text\n",
        (
            "assert roman(4) == 'IV'",
            "assert roman(1994) == 'MCMXCIV'",
            "assert roman(3888) == 'MMMDCCCLXXXVIII'",
        ),
    ),
    (
        'def flattened(nested):\n    """All items of lists within lists, at any depth, in order."""\n',
        "    flat = []\n"
        "    for item in nested:\n"
        "        flat += flattened(item) if isinstance(item, list) else [item]\n"
        "    return flat\n",
        (
            "assert flattened([1, [2, [3, [4]]], []]) == [1, 2, 3, 4]",
            "assert flattened([]) == []",
            "assert flattened(['ab', ['c']]) == ['ab', 'c']",
        ),
    ),
    (
        'def fewest_coins(amount, coins):\n    """Fewest coins (each used freely) that make up amount, or -1."""\n',
        "    fewest = [0] + [None] * amount\n"
        "    for total in range(1, amount + 1):\n"
        "        known = [fewest[total - c] for c in coins if c <= total and fewest[total - c] is not None]\n"
        "        fewest[total] = min(known) + 1 if known else None\n"
        "    return -1 if fewest[amount] is None else fewest[amount]\n",
        (
            "assert fewest_coins(6, [1, 3, 4]) == 2",
            "assert fewest_coins(3, [2]) == -1",
            "assert fewest_coins(0, [5]) == 0",
            "assert fewest_coins(63, [1, 5, 10, 21, 25]) == 3",
        ),
    ),
    (
        'def common_prefix(words):\n    """The longest text that every word of the list begins with."""\n',
        "    prefix = words[0] if words else ''\n"
        "    for word in words:\n"
        "        while not word.startswith(prefix):\n"
        "            prefix = prefix[:-1]\n"
        "    return prefix\n",
        (
            "assert common_prefix(['flower', 'flow', 'flight']) == 'fl'",
            "assert common_prefix(['a', 'b']) == ''",
            "assert common_prefix([]) == ''",
            "assert common_prefix(['same', 'same']) == 'same'",
        ),
    ),
)

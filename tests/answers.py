"""The Law School Admission Test, sections 6 and 7: 1,000 people, five answers, 0 wrong or 1 right; Bock & Lieberman 1970."""

import itertools

import torch

# how many people gave each pattern, in the order of itertools.product((0, 1), repeat=5)
COUNTS = {
    6: [
        3,
        6,
        2,
        11,
        1,
        1,
        3,
        4,
        1,
        8,
        0,
        16,
        0,
        3,
        2,
        15,
        10,
        29,
        14,
        81,
        3,
        28,
        15,
        80,
        16,
        56,
        21,
        173,
        11,
        61,
        28,
        298,
    ],
    7: [
        12,
        19,
        1,
        7,
        3,
        19,
        3,
        17,
        10,
        5,
        3,
        7,
        7,
        23,
        8,
        28,
        7,
        39,
        11,
        34,
        14,
        51,
        15,
        90,
        6,
        25,
        7,
        35,
        18,
        136,
        32,
        308,
    ],
}


def lsat(section):
    """The answers (1000, 5), float64."""
    patterns = torch.tensor(list(itertools.product((0.0, 1.0), repeat=5)), dtype=torch.float64)
    return patterns.repeat_interleave(torch.tensor(COUNTS[section]), 0)

"""Random problems for varlen_attention's kernels of sm_90 on the host executor."""

import attention_fuzz


def test_random_problems():
    attention_fuzz.check_random_problems(90)


def test_configurations_cover_what_matters():
    attention_fuzz.check_coverage(90)

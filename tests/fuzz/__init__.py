"""Every public function on arguments that nobody should give: a refusal that names the argument, or a right answer.

    subject.py       what the fuzz needs to know of a function: how a valid call is drawn
    mutations.py     what is done to an argument of a valid call
    oracle.py        runs a case and says what is wrong with its outcome
    attention.py, linear.py, merging.py, bits.py, masks.py, modules.py, others.py     the functions

A case is one integer: it seeds the choice of the function, the valid call and up to three mutations of it. Hypothesis
draws the integer; the mutations that are not needed to fail are taken back before a failure is reported.
"""

"""`viaticum demo`: 24 questions in three lanes within one budget, then a job that is killed and goes on.

    questions      the questions and the router that ship
    lanes          always small, always large and routed, in turns on the same machine
    verdict        whether routing paid in this run, and what chance could have done
    authorship     one answer with the model that wrote each token
    interruption   a batch with too little money, killed and resumed
    screen         what is printed, on a terminal and in a pipe
    show           the parts in their order, timed

All figures are measured while it runs. Leaves out the command's options (`viaticum.commands.demo`).
"""

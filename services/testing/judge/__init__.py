"""A judge of training runs: every client call is recorded, and the history is compared with a model of what must hold.

`recorder.py` records, `history.py` is what it records. `verdict.py` judges, by rules that know no service: those of
`episodes.py`, `versions.py`, `memories.py` and `reads.py`, `learners.py` and `gradients.py`, `rewards.py`,
`evaluations.py` and `access.py`. The models are environments, and a learner (`replayed.py`), that do once what was
asked for. `final.py` asks the services what they hold at the end. `cluster.py` runs the services, `network.py`,
`disks.py` and `nemesis.py` break them.
"""

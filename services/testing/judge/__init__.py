"""A judge of training runs: every client call is recorded, and the history is compared with a model of what must hold.

`recorder.py` records, `history.py` is what it records. `verdict.py` judges, by the rules of `episodes.py`,
`versions.py`, `memories.py`, `learners.py`, `rewards.py` and `access.py`, which know no service. `final.py` asks the
services what they hold at the end. `cluster.py` runs the services, `network.py`, `disks.py` and `nemesis.py` break
them.
"""

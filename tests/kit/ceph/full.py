# Makes the cluster full ("true"), or lets it have space again, and waits until its pool says so. Comes after what
# Cluster::python defines. One process for it all: a test may have only seconds for this.
import json
import time


def ask(**command):
    code, answer, why = cluster.mon_command(json.dumps(command), b"")
    assert code == 0, why
    return answer


def is_full():
    pools = json.loads(ask(prefix="osd dump", format="json"))["pools"]
    return any("full" in pool["flags_names"].split(",") for pool in pools if pool["pool_name"] == sys.argv[2])


# What an OSD may hold at most is set below what it holds. Each ratio may only be lower than the next.
if sys.argv[1] == "true":
    ratios = [("nearfull", 1e-7), ("backfillfull", 1e-7), ("full", 1e-7)]
else:
    ratios = [("full", 0.95), ("backfillfull", 0.9), ("nearfull", 0.85)]
for name, ratio in ratios:
    ask(prefix=f"osd set-{name}-ratio", ratio=ratio)
while is_full() != (sys.argv[1] == "true"):
    time.sleep(0.1)

#!/usr/bin/env python3
"""Runs the same load against Chronik and Apache Kafka on this machine and prints one report.

Both clusters have three brokers; only one runs at a time. Every run reads all its records back and
compares them (bench/load), so a figure without its data cannot appear. Figures of one report may be
compared with each other, not with those of another machine or day.

Chronik's acks=all means: fsynced by a majority. Apache Kafka's default means: in the page cache of
the in-sync replicas. The report says so.
"""

import argparse
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CACHE = Path(os.environ.get("CHRONIK_TEST_CACHE", Path.home() / ".cache" / "chronik-tests"))
BIN = Path(os.environ.get("CHRONIK_BIN_DIR", ROOT / "target" / "release"))

# name, load options
SCENARIOS = {
    "throughput": ["-producers", "1", "-size", "1024", "-linger", "5ms"],
    "latency": ["-producers", "1", "-size", "1024", "-linger", "0s", "-rate", "2000"],
    "small-producers": ["-producers", "32", "-size", "256", "-linger", "0s", "-in-flight", "1"],
}


def free_ports(count):
    sockets = [socket.socket() for _ in range(count)]
    for s in sockets:
        s.bind(("127.0.0.1", 0))
    ports = [s.getsockname()[1] for s in sockets]
    for s in sockets:
        s.close()
    return ports


def wait_for_port(port, process, seconds):
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise SystemExit(f"a process of the cluster ended early with {process.returncode}")
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
            return
        except OSError:
            time.sleep(0.05)
    raise SystemExit(f"nothing listens on port {port} after {seconds} s")


class Cluster:
    """A running cluster: `bootstrap`, and the processes whose CPU and memory are counted."""

    def __init__(self, folder):
        self.folder = folder
        self.processes = []

    def pids(self):
        """The processes of the cluster itself, launchers and their children."""
        found = [p.pid for p in self.processes]
        for pid in list(found):
            children = Path(f"/proc/{pid}/task/{pid}/children")
            if children.exists():
                found += [int(c) for c in children.read_text().split()]
        return found

    def cpu_seconds(self):
        ticks = 0
        for pid in self.pids():
            try:
                fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
                ticks += int(fields[11]) + int(fields[12])
            except OSError:
                pass
        return ticks / os.sysconf("SC_CLK_TCK")

    def rss_mb(self):
        total = 0
        for pid in self.pids():
            try:
                for line in Path(f"/proc/{pid}/status").read_text().splitlines():
                    if line.startswith("VmRSS"):
                        total += int(line.split()[1])
            except OSError:
                pass
        return total / 1024

    def stop(self):
        for process in self.processes:
            process.send_signal(signal.SIGTERM)
        for process in self.processes:
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


class Kafka(Cluster):
    def __init__(self, folder, libs, heap):
        super().__init__(folder)
        jars = str(libs / "*")
        ports = free_ports(6)
        brokers, controllers = ports[:3], ports[3:]
        voters = ",".join(f"{i + 1}@127.0.0.1:{p}" for i, p in enumerate(controllers))
        cluster_id = "MkU3OEVBNTcwNTJENDM2Qk"
        log4j = folder / "log4j2.yaml"
        log4j.write_text(
            "Configuration:\n  Appenders:\n    Console:\n      name: STDOUT\n"
            "      PatternLayout:\n        pattern: '%d %p %m (%c)%n'\n"
            "  Loggers:\n    Root:\n      level: WARN\n      AppenderRef:\n        ref: STDOUT\n"
        )
        for i in range(3):
            config = folder / f"kafka-{i + 1}.properties"
            config.write_text(
                f"process.roles=broker,controller\nnode.id={i + 1}\n"
                f"controller.quorum.voters={voters}\n"
                f"listeners=PLAINTEXT://127.0.0.1:{brokers[i]},CONTROLLER://127.0.0.1:{controllers[i]}\n"
                f"advertised.listeners=PLAINTEXT://127.0.0.1:{brokers[i]}\n"
                "controller.listener.names=CONTROLLER\ninter.broker.listener.name=PLAINTEXT\n"
                "listener.security.protocol.map=PLAINTEXT:PLAINTEXT,CONTROLLER:PLAINTEXT\n"
                f"log.dirs={folder}/kafka-{i + 1}\ndefault.replication.factor=3\n"
                "offsets.topic.replication.factor=3\nmin.insync.replicas=2\n"
            )
            java = ["java", f"-Dlog4j2.configurationFile={log4j}", "-cp", jars]
            subprocess.run(
                java + ["kafka.tools.StorageTool", "format", "-t", cluster_id, "-c", str(config)],
                check=True, stdout=subprocess.DEVNULL,
            )
            log = open(folder / f"kafka-{i + 1}.log", "w")
            java[1:1] = [f"-Xmx{heap}", f"-Xms{heap}", "-server", "-XX:+UseG1GC"]
            self.processes.append(
                subprocess.Popen(java + ["kafka.Kafka", str(config)], stdout=log, stderr=log)
            )
        for port, process in zip(brokers, self.processes):
            wait_for_port(port, process, 60)
        self.bootstrap = ",".join(f"127.0.0.1:{p}" for p in brokers)
        self.jars = jars

    def create_topic(self, name, partitions, replication):
        create_topic(self.jars, self.bootstrap, name, partitions, replication)


class Chronik(Cluster):
    def __init__(self, folder, libs):
        super().__init__(folder)
        log = open(folder / "dev.log", "w")
        process = subprocess.Popen(
            [BIN / "chronik", "dev", "--data-dir", folder / "data", "--kafka-port", "0",
             "--rest-port", "0", "--json"],
            stdout=subprocess.PIPE, stderr=log, text=True,
        )
        self.processes.append(process)
        line = process.stdout.readline()
        if not line:
            raise SystemExit(f"chronik dev did not start, see {folder}/dev.log")
        self.bootstrap = ",".join(json.loads(line)["kafka"])
        self.jars = str(libs / "*")

    def create_topic(self, name, partitions, replication):
        create_topic(self.jars, self.bootstrap, name, partitions, replication)


def create_topic(jars, bootstrap, name, partitions, replication):
    """The same tool creates the topic in both systems."""
    subprocess.run(
        ["java", "-cp", jars, "org.apache.kafka.tools.TopicCommand", "--bootstrap-server", bootstrap,
         "--create", "--topic", name, "--partitions", str(partitions),
         "--replication-factor", str(replication), "--config", "min.insync.replicas=2"],
        check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )


def run_load(load, cluster, topic, partitions, records, options):
    cpu = cluster.cpu_seconds()
    out = subprocess.run(
        [load, "-brokers", cluster.bootstrap, "-topic", topic, "-partitions", str(partitions),
         "-records", str(records), *options],
        stdout=subprocess.PIPE, text=True,
    )
    if out.returncode not in (0, 2) or not out.stdout:
        raise SystemExit(f"the load against {topic} failed with exit code {out.returncode}")
    figures = json.loads(out.stdout)
    figures["cluster_cpu_seconds"] = round(cluster.cpu_seconds() - cpu, 2)
    figures["cluster_rss_mb"] = round(cluster.rss_mb())
    return figures


def show(rows):
    columns = [
        ("MB/s", "mb_per_second", "{:.1f}"), ("records/s", "records_per_second", "{:.0f}"),
        ("p50 ms", "ack_p50_ms", "{:.2f}"), ("p99 ms", "ack_p99_ms", "{:.2f}"),
        ("max ms", "ack_max_ms", "{:.0f}"), ("read MB/s", "read_mb_per_second", "{:.1f}"),
        ("CPU s", "cluster_cpu_seconds", "{:.1f}"), ("RSS MB", "cluster_rss_mb", "{:.0f}"),
        ("lost", "lost", "{}"), ("dup", "duplicated", "{}"), ("errors", "produce_errors", "{}"),
    ]
    print(f"{'scenario':18} {'round':5} {'system':8}" + "".join(f"{c[0]:>11}" for c in columns))
    for scenario, round_number, system, f in rows:
        print(f"{scenario:18} {round_number:<5} {system:8}"
              + "".join(f"{c[2].format(f[c[1]]):>11}" for c in columns))


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--scenarios", default=",".join(SCENARIOS))
    parser.add_argument("--records", type=int, default=300_000, help="of the throughput scenario")
    parser.add_argument("--partitions", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--systems", default="kafka,chronik")
    parser.add_argument("--kafka-libs", type=Path, default=CACHE / "kafka" / "libs")
    parser.add_argument("--kafka-heap", default="1G")
    parser.add_argument("--keep", action="store_true", help="keep data and logs")
    args = parser.parse_args()

    if not list(args.kafka_libs.glob("kafka_2.13-*.jar")):
        raise SystemExit(f"no Apache Kafka in {args.kafka_libs}: run scripts/install-test-tools.sh")
    CACHE.mkdir(parents=True, exist_ok=True)
    load = CACHE / "bench-load"
    subprocess.run(["go", "build", "-o", load, "."], cwd=ROOT / "bench" / "load", check=True)

    counts = {"throughput": args.records, "latency": 20_000, "small-producers": 20_000}
    rows = []
    for round_number in range(1, args.rounds + 1):
        for system in args.systems.split(","):
            folder = Path(tempfile.mkdtemp(prefix=f"chronik-bench-{system}-"))
            started = time.monotonic()
            cluster = (Kafka(folder, args.kafka_libs, args.kafka_heap) if system == "kafka"
                       else Chronik(folder, args.kafka_libs))
            print(f"round {round_number}: {system} is up after "
                  f"{time.monotonic() - started:.1f} s, {cluster.rss_mb():.0f} MB", file=sys.stderr)
            try:
                # Warms up the JVM, connections and files; not counted.
                cluster.create_topic("warm-up", args.partitions, 3)
                run_load(load, cluster, "warm-up", args.partitions, 30_000, ["-size", "1024"])
                for scenario in args.scenarios.split(","):
                    cluster.create_topic(scenario, args.partitions, 3)
                    figures = run_load(load, cluster, scenario, args.partitions,
                                       counts[scenario], SCENARIOS[scenario])
                    rows.append((scenario, round_number, system, figures))
                    print(f"round {round_number}: {system} {scenario}: "
                          f"{figures['mb_per_second']:.1f} MB/s", file=sys.stderr)
            finally:
                cluster.stop()
                if not args.keep:
                    shutil.rmtree(folder, ignore_errors=True)

    rows.sort(key=lambda row: (row[0], row[1], row[2]))
    print("three brokers each, replication factor 3, acks=all, min.insync.replicas=2, idempotent")
    print("chronik: fsynced by a majority before the ack; kafka: page cache (its default)")
    show(rows)
    bad = [row for row in rows
           if any(row[3][what] for what in ("lost", "duplicated", "reordered", "corrupt"))]
    if bad:
        raise SystemExit("records were lost, duplicated, reordered or changed: see above")


if __name__ == "__main__":
    main()

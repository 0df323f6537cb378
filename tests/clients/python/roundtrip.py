"""Fills the topics <client>-<codec> with the records of the client matrix and reads them back.

Usage: roundtrip.py confluent|kafka-python BOOTSTRAP RECORDS [CODEC...]

Every topic exists with 3 partitions. A record is "<client>:<number, 8 digits>:<filling>" in partition
number mod 3; other clients check the same rule, so what is written here can be read by any of them.
"""

import sys
import time

PARTITIONS = 3
TIMEOUT_SECONDS = 60


def value_of(client, number):
    return f"{client}:{number:08d}:{chr(ord('a') + number % 26) * 100}".encode()


def produce_confluent(bootstrap, topic, client, records, codec):
    from confluent_kafka import Producer

    failures = []
    acked = [0]

    def delivered(error, _message):
        if error is not None:
            failures.append(str(error))
        else:
            acked[0] += 1

    producer = Producer({
        "bootstrap.servers": bootstrap,
        "compression.type": codec,
        "enable.idempotence": True,
        "linger.ms": 5,
    })
    for number in range(records):
        producer.produce(topic, value_of(client, number), partition=number % PARTITIONS,
                         on_delivery=delivered)
        producer.poll(0)
    left = producer.flush(TIMEOUT_SECONDS)
    if left or failures or acked[0] != records:
        raise SystemExit(f"{topic}: {acked[0]} of {records} acknowledged, {left} left: {failures[:3]}")


def consume_confluent(bootstrap, topic, records):
    from confluent_kafka import Consumer, TopicPartition, OFFSET_BEGINNING

    consumer = Consumer({
        "bootstrap.servers": bootstrap,
        "group.id": f"{topic}-reader",
        "enable.auto.commit": False,
        "check.crcs": True,
    })
    consumer.assign([TopicPartition(topic, p, OFFSET_BEGINNING) for p in range(PARTITIONS)])
    deadline = time.monotonic() + TIMEOUT_SECONDS
    found = 0
    while found < records and time.monotonic() < deadline:
        for message in consumer.consume(1000, 1.0):
            if message.error():
                raise SystemExit(f"{topic}: {message.error()}")
            found += 1
            yield message.partition(), message.offset(), message.value()
    consumer.close()


def produce_kafka_python(bootstrap, topic, client, records, codec):
    from kafka import KafkaProducer

    producer = KafkaProducer(
        bootstrap_servers=bootstrap.split(","),
        acks="all",
        compression_type=None if codec == "none" else codec,
        linger_ms=5,
    )
    sent = [producer.send(topic, value_of(client, number), partition=number % PARTITIONS)
            for number in range(records)]
    producer.flush(TIMEOUT_SECONDS)
    for future in sent:
        future.get(TIMEOUT_SECONDS)
    producer.close()


def consume_kafka_python(bootstrap, topic, records):
    from kafka import KafkaConsumer, TopicPartition

    consumer = KafkaConsumer(
        bootstrap_servers=bootstrap.split(","),
        auto_offset_reset="earliest",
        enable_auto_commit=False,
        check_crcs=True,
    )
    consumer.assign([TopicPartition(topic, p) for p in range(PARTITIONS)])
    deadline = time.monotonic() + TIMEOUT_SECONDS
    found = 0
    while found < records and time.monotonic() < deadline:
        for messages in consumer.poll(1000).values():
            for message in messages:
                found += 1
                yield message.partition, message.offset, message.value
    consumer.close()


CLIENTS = {
    "confluent": (produce_confluent, consume_confluent),
    "kafka-python": (produce_kafka_python, consume_kafka_python),
}


def check(topic, client, records, found):
    following = list(range(PARTITIONS))
    count = 0
    for partition, offset, value in found:
        expected = value_of(client, following[partition])
        if value != expected:
            raise SystemExit(f"{topic}-{partition} offset {offset}: {value[:40]} for {expected[:40]}")
        following[partition] += PARTITIONS
        count += 1
    if count != records:
        raise SystemExit(f"{topic}: read {count} of {records} records")


def main():
    client, bootstrap, records = sys.argv[1], sys.argv[2], int(sys.argv[3])
    codecs = sys.argv[4:] or ["none", "gzip", "snappy", "lz4", "zstd"]
    produce, consume = CLIENTS[client]
    for codec in codecs:
        topic = f"{client}-{codec}"
        produce(bootstrap, topic, client, records, codec)
        check(topic, client, records, consume(bootstrap, topic, records))
        print(f"{topic}: {records} records written and read back", flush=True)


if __name__ == "__main__":
    main()

// Command load measures producing to a Kafka-compatible cluster and then reads everything back.
//
// Every record carries its producer, its number and a checksum of its filling. A figure is printed
// only after each acknowledged record was read back exactly once, in order and unchanged, so a
// system cannot win by losing data. Output is one JSON object.
package main

import (
	"context"
	"encoding/binary"
	"encoding/json"
	"flag"
	"fmt"
	"hash/crc32"
	"math/rand"
	"os"
	"sort"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/twmb/franz-go/pkg/kgo"
)

const headerSize = 16 // producer u32, number u64, crc u32

type options struct {
	brokers    string
	topic      string
	partitions int
	producers  int
	records    int
	size       int
	rate       int
	linger     time.Duration
	inFlight   int
	timeout    time.Duration
	readBack   bool
}

type result struct {
	Records        int     `json:"records"`
	RecordSize     int     `json:"record_size_bytes"`
	Seconds        float64 `json:"produce_seconds"`
	RecordsPerSec  float64 `json:"records_per_second"`
	MBPerSec       float64 `json:"mb_per_second"`
	P50Ms          float64 `json:"ack_p50_ms"`
	P99Ms          float64 `json:"ack_p99_ms"`
	P999Ms         float64 `json:"ack_p999_ms"`
	MaxMs          float64 `json:"ack_max_ms"`
	ReadSeconds    float64 `json:"read_seconds"`
	ReadMBPerSec   float64 `json:"read_mb_per_second"`
	Lost           int     `json:"lost"`
	Duplicated     int     `json:"duplicated"`
	Reordered      int     `json:"reordered"`
	Corrupt        int     `json:"corrupt"`
	ProduceErrors  int64   `json:"produce_errors"`
	FirstProduceEr string  `json:"first_produce_error,omitempty"`
}

func main() {
	var o options
	flag.StringVar(&o.brokers, "brokers", "127.0.0.1:9092", "host:port of the cluster")
	flag.StringVar(&o.topic, "topic", "load", "an existing, empty topic")
	flag.IntVar(&o.partitions, "partitions", 6, "partitions of the topic")
	flag.IntVar(&o.producers, "producers", 1, "producer clients, each with its own connections")
	flag.IntVar(&o.records, "records", 100000, "records in all")
	flag.IntVar(&o.size, "size", 1024, "bytes per record value, at least 16")
	flag.IntVar(&o.rate, "rate", 0, "records per second in all; 0: as fast as acks come back")
	flag.DurationVar(&o.linger, "linger", 5*time.Millisecond, "how long a batch waits to fill")
	flag.IntVar(&o.inFlight, "in-flight", 20000, "records waiting for their ack, per producer")
	flag.DurationVar(&o.timeout, "timeout", 3*time.Minute, "for each of producing and reading back")
	flag.BoolVar(&o.readBack, "read-back", true, "read everything back and compare")
	flag.Parse()
	if o.size < headerSize || o.records < 1 || o.producers < 1 || o.partitions < 1 {
		fmt.Fprintln(os.Stderr, "load: -size must be at least 16, the other counts at least 1")
		os.Exit(64)
	}
	r, err := run(o)
	if err != nil {
		fmt.Fprintln(os.Stderr, "load:", err)
		os.Exit(1)
	}
	_ = json.NewEncoder(os.Stdout).Encode(r)
	if r.Lost+r.Duplicated+r.Reordered+r.Corrupt > 0 || r.ProduceErrors > 0 {
		os.Exit(2)
	}
}

func run(o options) (result, error) {
	r := result{Records: o.records, RecordSize: o.size}
	latencies, seconds, failures, firstError, err := produce(o)
	if err != nil {
		return r, err
	}
	r.Seconds = seconds
	r.RecordsPerSec = float64(o.records) / seconds
	r.MBPerSec = float64(o.records) * float64(o.size) / seconds / 1e6
	r.ProduceErrors, r.FirstProduceEr = failures, firstError
	sort.Float64s(latencies)
	at := func(q float64) float64 {
		if len(latencies) == 0 {
			return 0
		}
		return latencies[int(q*float64(len(latencies)-1))]
	}
	r.P50Ms, r.P99Ms, r.P999Ms, r.MaxMs = at(0.5), at(0.99), at(0.999), at(1)
	if o.readBack {
		if err := readBack(o, &r); err != nil {
			return r, err
		}
	}
	return r, nil
}

// fill makes the value of one record: reproducible from its producer and number.
func fill(value []byte, producer uint32, number uint64, noise []byte) {
	binary.BigEndian.PutUint32(value[0:], producer)
	binary.BigEndian.PutUint64(value[4:], number)
	start := int(number*31) % (len(noise) / 2)
	copy(value[headerSize:], noise[start:])
	binary.BigEndian.PutUint32(value[12:], crc32.ChecksumIEEE(value[headerSize:]))
}

func produce(o options) ([]float64, float64, int64, string, error) {
	ctx, cancel := context.WithTimeout(context.Background(), o.timeout)
	defer cancel()
	noise := make([]byte, 2*o.size+2)
	rand.New(rand.NewSource(1)).Read(noise)

	var clients []*kgo.Client
	for range o.producers {
		client, err := kgo.NewClient(
			kgo.SeedBrokers(strings.Split(o.brokers, ",")...),
			kgo.RequiredAcks(kgo.AllISRAcks()),
			kgo.ProducerLinger(o.linger),
			kgo.ProducerBatchCompression(kgo.NoCompression()),
			kgo.MaxBufferedRecords(o.inFlight),
			kgo.RecordPartitioner(kgo.ManualPartitioner()),
			kgo.DefaultProduceTopic(o.topic),
		)
		if err != nil {
			return nil, 0, 0, "", err
		}
		defer client.Close()
		// Connections, metadata and the producer id are set up before the clock starts.
		if err := client.Ping(ctx); err != nil {
			return nil, 0, 0, "", fmt.Errorf("cluster at %s does not answer: %w", o.brokers, err)
		}
		clients = append(clients, client)
	}

	var failures atomic.Int64
	var firstError atomic.Value
	var wg sync.WaitGroup
	perProducer := make([][]float64, o.producers)
	started := time.Now()
	for p, client := range clients {
		count := o.records / o.producers
		if p < o.records%o.producers {
			count++
		}
		perProducer[p] = make([]float64, count)
		wg.Add(1)
		go func() {
			defer wg.Done()
			var pending sync.WaitGroup
			buffer := make([]byte, count*o.size)
			for n := range count {
				if o.rate > 0 {
					due := started.Add(time.Duration(float64(n) * float64(o.producers) / float64(o.rate) * float64(time.Second)))
					if wait := time.Until(due); wait > 0 {
						time.Sleep(wait)
					}
				}
				value := buffer[n*o.size : (n+1)*o.size]
				fill(value, uint32(p), uint64(n), noise)
				pending.Add(1)
				sent := time.Now()
				record := &kgo.Record{Value: value, Partition: int32(n % o.partitions)}
				client.Produce(ctx, record, func(_ *kgo.Record, err error) {
					perProducer[p][n] = float64(time.Since(sent).Microseconds()) / 1000
					if err != nil {
						failures.Add(1)
						firstError.CompareAndSwap(nil, err.Error())
					}
					pending.Done()
				})
			}
			pending.Wait()
		}()
	}
	wg.Wait()
	seconds := time.Since(started).Seconds()
	var all []float64
	for _, latencies := range perProducer {
		all = append(all, latencies...)
	}
	first, _ := firstError.Load().(string)
	return all, seconds, failures.Load(), first, nil
}

func readBack(o options, r *result) error {
	ctx, cancel := context.WithTimeout(context.Background(), o.timeout)
	defer cancel()
	client, err := kgo.NewClient(
		kgo.SeedBrokers(strings.Split(o.brokers, ",")...),
		kgo.ConsumeTopics(o.topic),
		kgo.ConsumeResetOffset(kgo.NewOffset().AtStart()),
		kgo.FetchMaxBytes(64<<20),
	)
	if err != nil {
		return err
	}
	defer client.Close()

	type key struct {
		producer  uint32
		partition int32
	}
	last := map[key]int64{}
	seen := make([]map[uint64]int, o.producers)
	for p := range seen {
		seen[p] = make(map[uint64]int, o.records/o.producers+1)
	}
	found := 0
	started := time.Now()
	for found < o.records {
		fetches := client.PollFetches(ctx)
		if ctx.Err() != nil {
			break
		}
		for _, e := range fetches.Errors() {
			return fmt.Errorf("reading %s-%d back: %w", e.Topic, e.Partition, e.Err)
		}
		fetches.EachRecord(func(record *kgo.Record) {
			found++
			v := record.Value
			if len(v) != o.size || crc32.ChecksumIEEE(v[headerSize:]) != binary.BigEndian.Uint32(v[12:]) {
				r.Corrupt++
				return
			}
			producer, number := binary.BigEndian.Uint32(v[0:]), binary.BigEndian.Uint64(v[4:])
			if int(producer) >= o.producers || int64(number) > int64(o.records) {
				r.Corrupt++
				return
			}
			seen[producer][number]++
			k := key{producer, record.Partition}
			if before, ok := last[k]; ok && int64(number) < before {
				r.Reordered++
			}
			last[k] = int64(number)
		})
	}
	r.ReadSeconds = time.Since(started).Seconds()
	r.ReadMBPerSec = float64(found) * float64(o.size) / r.ReadSeconds / 1e6
	total := 0
	for p := range seen {
		for _, times := range seen[p] {
			total++
			r.Duplicated += times - 1
		}
	}
	r.Lost = o.records - total
	return nil
}

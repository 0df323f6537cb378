// The verified producer and reader of the fault tests.
package main

import (
	"bufio"
	"bytes"
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"hash/crc32"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"github.com/twmb/franz-go/pkg/kgo"
	"github.com/twmb/franz-go/pkg/kmsg"
)

const (
	headerSize   = 16 // producer u32, partition u32, sequence u32, crc u32 of all else
	notAcked     = -2
	offsetHidden = -1 // acknowledged without an offset
)

// ledger is what the producer knows: per stream the offset each sequence was acknowledged at.
type ledger struct {
	Size    int                `json:"size"`
	Offsets map[string][]int64 `json:"offsets"` // "<producer>/<partition>"
}

func streamName(producer, partition int) string { return fmt.Sprintf("%d/%d", producer, partition) }

func fill(value []byte, producer, partition, sequence int) {
	binary.BigEndian.PutUint32(value[0:], uint32(producer))
	binary.BigEndian.PutUint32(value[4:], uint32(partition))
	binary.BigEndian.PutUint32(value[8:], uint32(sequence))
	for i := headerSize; i < len(value); i++ {
		value[i] = byte(sequence*31 + partition*7 + i)
	}
	binary.BigEndian.PutUint32(value[12:], checksum(value))
}

func checksum(value []byte) uint32 {
	sum := crc32.ChecksumIEEE(value[:12])
	return crc32.Update(sum, crc32.IEEETable, value[headerSize:])
}

func produce(ctx context.Context, args []string) error {
	c := newCommon("produce")
	partitions := c.flags.Int("partitions", 6, "of the topic")
	records := c.flags.Int("records", 1_000_000, "in all")
	producers := c.flags.Int("producers", 1, "clients")
	size := c.flags.Int("size", 200, "bytes per record")
	rate := c.flags.Int("rate", 0, "records per second in all; 0: as fast as acks come back")
	inFlight := c.flags.Int("in-flight", 20_000, "records without ack per producer")
	acks := c.flags.String("acks", "all", "all, 1 or 0")
	idempotent := c.flags.Bool("idempotent", true, "acks=all only")
	retries := c.flags.Int("retries", 1<<30, "per record")
	path := c.flags.String("ledger", "", "file for what was acknowledged")
	untilTold := c.flags.Bool("until-told", false, "end when standard input does; -records is a limit then")
	_ = c.flags.Parse(args)
	if *size < headerSize {
		return errors.New("-size must be at least 16")
	}
	ctx, cancel := context.WithTimeout(ctx, c.timeout)
	defer cancel()

	opts := []kgo.Opt{
		kgo.DefaultProduceTopic(c.topic),
		kgo.MaxBufferedRecords(*inFlight),
		kgo.ProducerBatchCompression(kgo.NoCompression()),
		kgo.RecordRetries(*retries),
		kgo.ProduceRequestTimeout(5 * time.Second),
	}
	switch *acks {
	case "all":
		opts = append(opts, kgo.RequiredAcks(kgo.AllISRAcks()))
	case "1":
		opts = append(opts, kgo.RequiredAcks(kgo.LeaderAck()))
	case "0":
		opts = append(opts, kgo.RequiredAcks(kgo.NoAck()))
	default:
		return fmt.Errorf("unknown acks %q", *acks)
	}
	if *acks != "all" || !*idempotent {
		opts = append(opts, kgo.DisableIdempotentWrite(), kgo.MaxProduceRequestsInflightPerBroker(1))
	}

	var told atomic.Bool
	if *untilTold {
		go func() {
			_, _ = bufio.NewReader(os.Stdin).ReadString(0)
			told.Store(true)
		}()
	}
	book := ledger{Size: *size, Offsets: map[string][]int64{}}
	var sent, acked, failed atomic.Int64
	var firstError atomic.Value
	var wg sync.WaitGroup
	for p := range *producers {
		client, err := c.client(opts...)
		if err != nil {
			return err
		}
		defer client.Close()
		streams := make([][]int64, *partitions)
		count := *records / *producers
		for partition := range streams {
			sent := count / *partitions
			if partition < count%*partitions {
				sent++
			}
			streams[partition] = make([]int64, sent)
			for i := range streams[partition] {
				streams[partition][i] = notAcked
			}
			book.Offsets[streamName(p, partition)] = streams[partition]
		}
		wg.Add(1)
		go func() {
			defer wg.Done()
			var pending sync.WaitGroup
			started := time.Now()
			for n := range count {
				if *rate > 0 && n%64 == 0 {
					due := started.Add(time.Duration(float64(n**producers) / float64(*rate) * float64(time.Second)))
					pace(ctx, time.Until(due))
				}
				if told.Load() {
					break
				}
				sent.Add(1)
				partition, sequence := n%*partitions, n / *partitions
				value := make([]byte, *size)
				fill(value, p, partition, sequence)
				pending.Add(1)
				client.Produce(ctx, &kgo.Record{Value: value, Partition: int32(partition)}, func(r *kgo.Record, err error) {
					defer pending.Done()
					if err != nil {
						failed.Add(1)
						firstError.CompareAndSwap(nil, err.Error())
						return
					}
					offset := r.Offset
					if offset < 0 || *acks == "0" {
						offset = offsetHidden
					}
					streams[partition][sequence] = offset
					// The test that drives this kills servers at certain counts.
					if done := acked.Add(1); done%10_000 == 0 {
						fmt.Printf("acked %d\n", done)
					}
				})
			}
			pending.Wait()
		}()
	}
	started := time.Now()
	wg.Wait()
	if *path != "" {
		if err := writeLedger(*path, book); err != nil {
			return err
		}
	}
	first, _ := firstError.Load().(string)
	return json.NewEncoder(os.Stdout).Encode(map[string]any{
		"sent": sent.Load(), "acked": acked.Load(), "unknown": failed.Load(), "first_error": first,
		"seconds": time.Since(started).Seconds(),
	})
}

func writeLedger(path string, book ledger) error {
	encoded, err := json.Marshal(book)
	if err != nil {
		return err
	}
	return os.WriteFile(path, encoded, 0o644)
}

type verdict struct {
	Read       int    `json:"read"`
	Acked      int    `json:"acked"`
	Lost       int    `json:"lost"`
	Duplicated int    `json:"duplicated"`
	Reordered  int    `json:"reordered"`
	Changed    int    `json:"changed"`
	Invented   int    `json:"invented"`
	Moved      int    `json:"moved"` // read at another offset than acknowledged
	OffsetGaps int    `json:"offset_gaps"`
	Example    string `json:"example,omitempty"`
}

func (v *verdict) wrong(count *int, format string, args ...any) {
	*count++
	if v.Example == "" {
		v.Example = fmt.Sprintf(format, args...)
	}
}

func (v *verdict) bad() bool {
	return v.Lost+v.Duplicated+v.Reordered+v.Changed+v.Invented+v.Moved+v.OffsetGaps > 0
}

func verify(ctx context.Context, args []string) error {
	c := newCommon("verify")
	path := c.flags.String("ledger", "", "file that `produce` wrote")
	_ = c.flags.Parse(args)
	ctx, cancel := context.WithTimeout(ctx, c.timeout)
	defer cancel()
	var book ledger
	encoded, err := os.ReadFile(*path)
	if err != nil {
		return err
	}
	if err := json.Unmarshal(encoded, &book); err != nil {
		return err
	}
	client, err := c.client(
		kgo.ConsumeTopics(c.topic),
		kgo.ConsumeResetOffset(kgo.NewOffset().AtStart()),
		kgo.FetchMaxBytes(32<<20),
	)
	if err != nil {
		return err
	}
	defer client.Close()
	v, err := readAll(ctx, client, c.topic, book)
	if err != nil {
		return err
	}
	if err := json.NewEncoder(os.Stdout).Encode(v); err != nil {
		return err
	}
	if v.bad() {
		return fmt.Errorf("a promise is broken: %s", v.Example)
	}
	return nil
}

// readAll reads every partition up to its end offset, asked for before.
func readAll(ctx context.Context, client *kgo.Client, topic string, book ledger) (verdict, error) {
	var v verdict
	ends, err := endOffsets(ctx, client, topic)
	if err != nil {
		return v, err
	}
	seen := map[string][]bool{}
	last := map[string]int{}
	for name, offsets := range book.Offsets {
		seen[name] = make([]bool, len(offsets))
		last[name] = -1
	}
	next := make([]int64, len(ends))
	expected := make([]byte, book.Size)
	done := func() bool {
		for p := range ends {
			if next[p] < ends[p] {
				return false
			}
		}
		return true
	}
	for !done() {
		fetches := client.PollFetches(ctx)
		for _, e := range fetches.Errors() {
			return v, fmt.Errorf("reading %s-%d back at %v of %v: %w", e.Topic, e.Partition, next, ends, e.Err)
		}
		fetches.EachRecord(func(r *kgo.Record) {
			v.Read++
			at := fmt.Sprintf("%s-%d offset %d", topic, r.Partition, r.Offset)
			if r.Offset != next[r.Partition] {
				v.wrong(&v.OffsetGaps, "%s comes after %d", at, next[r.Partition]-1)
			}
			next[r.Partition] = r.Offset + 1
			if len(r.Value) != book.Size || checksum(r.Value) != binary.BigEndian.Uint32(r.Value[12:]) {
				v.wrong(&v.Changed, "%s: bytes changed", at)
				return
			}
			producer := int(binary.BigEndian.Uint32(r.Value[0:]))
			partition := int(binary.BigEndian.Uint32(r.Value[4:]))
			sequence := int(binary.BigEndian.Uint32(r.Value[8:]))
			name := streamName(producer, partition)
			fill(expected, producer, partition, sequence)
			if partition != int(r.Partition) || sequence >= len(seen[name]) || !bytes.Equal(expected, r.Value) {
				v.wrong(&v.Invented, "%s: %s sequence %d was never sent so", at, name, sequence)
				return
			}
			if offset := book.Offsets[name][sequence]; offset >= 0 && offset != r.Offset && !seen[name][sequence] {
				v.wrong(&v.Moved, "%s: %s sequence %d was acknowledged at %d", at, name, sequence, offset)
			}
			switch {
			case seen[name][sequence]:
				v.wrong(&v.Duplicated, "%s: %s sequence %d again", at, name, sequence)
			case sequence < last[name]:
				v.wrong(&v.Reordered, "%s: %s sequence %d after %d", at, name, sequence, last[name])
			default:
				last[name] = sequence
			}
			seen[name][sequence] = true
		})
	}
	for name, offsets := range book.Offsets {
		for sequence, offset := range offsets {
			if offset == notAcked {
				continue
			}
			v.Acked++
			if !seen[name][sequence] {
				v.wrong(&v.Lost, "%s sequence %d was acknowledged at offset %d and is gone", name, sequence, offset)
			}
		}
	}
	return v, nil
}

// endOffsets asks for the log end of every partition of a topic. A partition that has no leader for
// a moment is asked again until the deadline.
func endOffsets(ctx context.Context, client *kgo.Client, topic string) ([]int64, error) {
	for {
		ends, err := tryEndOffsets(ctx, client, topic)
		if err == nil {
			return ends, nil
		}
		select {
		case <-ctx.Done():
			return nil, fmt.Errorf("end offsets of %s: %w", topic, err)
		case <-time.After(50 * time.Millisecond):
		}
	}
}

func tryEndOffsets(ctx context.Context, client *kgo.Client, topic string) ([]int64, error) {
	request := kmsg.NewPtrMetadataRequest()
	requested := kmsg.NewMetadataRequestTopic()
	requested.Topic = kmsg.StringPtr(topic)
	request.Topics = append(request.Topics, requested)
	metadata, err := request.RequestWith(ctx, client)
	if err != nil {
		return nil, err
	}
	if len(metadata.Topics) != 1 || len(metadata.Topics[0].Partitions) == 0 {
		return nil, fmt.Errorf("no metadata of %s", topic)
	}
	count := len(metadata.Topics[0].Partitions)
	list := kmsg.NewPtrListOffsetsRequest()
	list.ReplicaID = -1
	of := kmsg.NewListOffsetsRequestTopic()
	of.Topic = topic
	for p := range count {
		partition := kmsg.NewListOffsetsRequestTopicPartition()
		partition.Partition = int32(p)
		partition.Timestamp = -1
		of.Partitions = append(of.Partitions, partition)
	}
	list.Topics = append(list.Topics, of)
	ends := make([]int64, count)
	found := 0
	for _, shard := range client.RequestSharded(ctx, list) {
		if shard.Err != nil {
			return nil, shard.Err
		}
		for _, t := range shard.Resp.(*kmsg.ListOffsetsResponse).Topics {
			for _, p := range t.Partitions {
				if p.ErrorCode != 0 {
					return nil, fmt.Errorf("%s-%d answers error code %d", topic, p.Partition, p.ErrorCode)
				}
				ends[p.Partition] = p.Offset
				found++
			}
		}
	}
	if found != count {
		return nil, fmt.Errorf("%d of %d partitions answered", found, count)
	}
	return ends, nil
}

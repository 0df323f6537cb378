// The probe of the failover tests, and a group member that can be told to leave.
package main

import (
	"bufio"
	"context"
	"fmt"
	"os"
	"strings"
	"sync"
	"time"

	"github.com/twmb/franz-go/pkg/kgo"
)

// probe writes one record after the other with acks=all to one partition each, and prints a line per
// ack: partition, sequence, and the wall clock in nanoseconds when the write began and was
// acknowledged. It ends when standard input does.
func probe(ctx context.Context, args []string) error {
	c := newCommon("probe")
	partitions := c.flags.Int("partitions", 1, "written to concurrently, each one record at a time")
	count := c.flags.Int("count", 0, "acks per partition after which to end; 0: none")
	pause := c.flags.Duration("pause", 5*time.Millisecond, "between an ack and the next write")
	_ = c.flags.Parse(args)
	ctx, cancel := context.WithTimeout(ctx, c.timeout)
	defer cancel()
	go func() {
		if *count == 0 {
			_, _ = bufio.NewReader(os.Stdin).ReadString(0)
			cancel()
		}
	}()
	client, err := c.client(
		kgo.DefaultProduceTopic(c.topic),
		kgo.ProducerLinger(0),
		kgo.AllowAutoTopicCreation(),
		kgo.UnknownTopicRetries(-1),
		kgo.ProduceRequestTimeout(5*time.Second),
	)
	if err != nil {
		return err
	}
	defer client.Close()
	var lines sync.Mutex
	var wg sync.WaitGroup
	var failure error
	for p := range *partitions {
		wg.Add(1)
		go func() {
			defer wg.Done()
			for n := 0; *count == 0 || n < *count; n++ {
				began := time.Now().UnixNano()
				// With a key, so that a compacted topic takes it.
				record := &kgo.Record{Partition: int32(p), Key: fmt.Appendf(nil, "probe %d", p), Value: fmt.Appendf(nil, "probe %d %d", p, n)}
				err := client.ProduceSync(ctx, record).FirstErr()
				if ctx.Err() != nil && *count == 0 {
					return
				}
				ended := time.Now().UnixNano()
				lines.Lock()
				if err != nil {
					failure = fmt.Errorf("partition %d: %w", p, err)
					lines.Unlock()
					return
				}
				fmt.Printf("ack %d %d %d %d\n", p, n, began, ended)
				lines.Unlock()
				pace(ctx, *pause)
			}
		}()
	}
	wg.Wait()
	return failure
}

// group joins a consumer group and prints "assigned <partitions>" at every change and "record
// <partition> <offset>" for each record, after it was committed. End of standard input: it
// leaves the group. Records are committed one poll at a time.
func group(ctx context.Context, args []string) error {
	c := newCommon("group")
	name := c.flags.String("group", "", "group id")
	_ = c.flags.Parse(args)
	ctx, cancel := context.WithTimeout(ctx, c.timeout)
	defer cancel()
	leave, left := context.WithCancel(ctx)
	defer left()
	go func() {
		_, _ = bufio.NewReader(os.Stdin).ReadString(0)
		left()
	}()
	var lines sync.Mutex
	say := func(format string, args ...any) {
		lines.Lock()
		defer lines.Unlock()
		fmt.Printf(format+"\n", args...)
	}
	owned := map[int32]bool{}
	show := func() {
		var list []string
		for p := range int32(1024) {
			if owned[p] {
				list = append(list, fmt.Sprint(p))
			}
		}
		say("assigned %s", strings.Join(list, ","))
	}
	lose := func(_ context.Context, _ *kgo.Client, lost map[string][]int32) {
		for _, p := range lost[c.topic] {
			delete(owned, p)
		}
		show()
	}
	client, err := c.client(
		kgo.ConsumerGroup(*name),
		kgo.ConsumeTopics(c.topic),
		kgo.Balancers(kgo.RangeBalancer()),
		kgo.ConsumeResetOffset(kgo.NewOffset().AtStart()),
		kgo.DisableAutoCommit(),
		kgo.SessionTimeout(6*time.Second),
		kgo.HeartbeatInterval(500*time.Millisecond),
		kgo.BlockRebalanceOnPoll(),
		kgo.OnPartitionsAssigned(func(_ context.Context, _ *kgo.Client, got map[string][]int32) {
			for _, p := range got[c.topic] {
				owned[p] = true
			}
			show()
		}),
		kgo.OnPartitionsRevoked(lose),
		kgo.OnPartitionsLost(lose),
	)
	if err != nil {
		return err
	}
	defer client.Close()
	for leave.Err() == nil {
		fetches := client.PollFetches(leave)
		if leave.Err() != nil {
			break
		}
		for _, e := range fetches.Errors() {
			fmt.Fprintf(os.Stderr, "group: %s-%d: %v\n", e.Topic, e.Partition, e.Err)
		}
		records := fetches.Records()
		if len(records) > 0 {
			if err := client.CommitRecords(ctx, records...); err != nil {
				fmt.Fprintf(os.Stderr, "group: commit: %v\n", err)
			} else {
				for _, r := range records {
					say("record %d %d", r.Partition, r.Offset)
				}
			}
		}
		client.AllowRebalance()
	}
	client.AllowRebalance()
	if err := client.LeaveGroupContext(ctx); err != nil {
		return fmt.Errorf("leaving: %w", err)
	}
	return ctx.Err()
}

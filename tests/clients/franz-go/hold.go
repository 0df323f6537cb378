// A member of a consumer group that stands still, for those who look at groups from outside.
//
// Invariant: the group's offsets are what was asked for and stay so: nothing is consumed, and nothing
// else is committed.
package main

import (
	"bufio"
	"context"
	"fmt"
	"os"
	"strconv"
	"strings"
	"time"

	"github.com/twmb/franz-go/pkg/kgo"
	"github.com/twmb/franz-go/pkg/kmsg"
)

// hold joins a group as its only member, commits the offsets that it is told, prints "holding" and the
// number of its partitions, and leaves when standard input ends.
func hold(ctx context.Context, args []string) error {
	c := newCommon("hold")
	name := c.flags.String("group", "", "group id")
	clientID := c.flags.String("client-id", "holder", "as the group's descriptions show it")
	offsets := c.flags.String("offsets", "", "to commit: PARTITION=OFFSET, with commas")
	_ = c.flags.Parse(args)
	ctx, cancel := context.WithTimeout(ctx, c.timeout)
	defer cancel()
	commit := map[int32]kgo.EpochOffset{}
	for _, pair := range strings.Split(*offsets, ",") {
		partition, offset, _ := strings.Cut(pair, "=")
		p, err := strconv.ParseInt(partition, 10, 32)
		if err != nil {
			return err
		}
		o, err := strconv.ParseInt(offset, 10, 64)
		if err != nil {
			return err
		}
		commit[int32(p)] = kgo.EpochOffset{Epoch: -1, Offset: o}
	}
	assigned := make(chan int, 1)
	client, err := c.client(
		kgo.ClientID(*clientID),
		kgo.ConsumerGroup(*name),
		kgo.ConsumeTopics(c.topic),
		kgo.Balancers(kgo.RangeBalancer()),
		kgo.DisableAutoCommit(),
		kgo.HeartbeatInterval(500*time.Millisecond),
		kgo.OnPartitionsAssigned(func(_ context.Context, client *kgo.Client, got map[string][]int32) {
			client.PauseFetchPartitions(got)
			select {
			case assigned <- len(got[c.topic]):
			default: // Only the first assignment is waited for.
			}
		}),
	)
	if err != nil {
		return err
	}
	defer client.Close()
	select {
	case count := <-assigned:
		var failure error
		client.CommitOffsetsSync(ctx, map[string]map[int32]kgo.EpochOffset{c.topic: commit},
			func(_ *kgo.Client, _ *kmsg.OffsetCommitRequest, response *kmsg.OffsetCommitResponse, err error) {
				failure = commitError(response, err)
			})
		if failure != nil {
			return failure
		}
		fmt.Printf("holding %d\n", count)
	case <-ctx.Done():
		return ctx.Err()
	}
	_, _ = bufio.NewReader(os.Stdin).ReadString(0)
	return client.LeaveGroupContext(ctx)
}

func commitError(response *kmsg.OffsetCommitResponse, err error) error {
	if err != nil {
		return err
	}
	for _, topic := range response.Topics {
		for _, partition := range topic.Partitions {
			if partition.ErrorCode != 0 {
				return fmt.Errorf("committing %d: error %d", partition.Partition, partition.ErrorCode)
			}
		}
	}
	return nil
}

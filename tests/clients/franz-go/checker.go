// The workload of the consistency checker: many clients that write unique values and read them,
// every operation noted in the history. It is told by lines on standard input what comes next:
//
//	note TEXT      put TEXT into the history, such as a fault that begins
//	warm           before the first fault: every producer has to be acknowledged in every partition
//	healed         all faults are over: every producer has to be acknowledged in every partition
//	finish         stop writing; every send has to get its outcome, every reader its records
//	readback TEXT  read everything from the start with a new client
//	quit           end
//
// and answers all but the first with "done". What does not happen within the bound is noted as stuck.
package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"math/rand"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"time"
)

type checker struct {
	*common
	history    *history
	seed       int64
	group      string
	rate       int
	bound      time.Duration
	partitions []partitionName

	nextClient, nextReader atomic.Int64
	sent, acked, failed    atomic.Int64
	unknown, polled        atomic.Int64
	commits                atomic.Int64

	// Ends the producers, then the readers.
	writing, reading context.Context

	mu        sync.Mutex
	producers map[*producer]bool
	// How far each reader that follows the log has come, per partition.
	positions map[string][]int64
}

// partitionName is what the history calls a partition by its number.
type partitionName struct {
	topic     string
	partition int32
}

func runChecker(ctx context.Context, args []string) error {
	c := &checker{common: newCommon("checker"), producers: map[*producer]bool{}, positions: map[string][]int64{}}
	path := c.flags.String("history", "", "file for the history")
	counts := c.flags.String("partitions", "", "partitions of each topic of -topic, with commas")
	c.flags.Int64Var(&c.seed, "seed", 1, "of the clients' choices")
	c.flags.StringVar(&c.group, "group", "checker", "group id of the group's members")
	c.flags.IntVar(&c.rate, "rate", 100, "sends per second of each producer")
	c.flags.DurationVar(&c.bound, "bound", time.Minute, "within which clients have to make progress")
	producers := c.flags.Int("producers", 2, "of each mode: idempotent, retry, once")
	members := c.flags.Int("members", 3, "of the group")
	_ = c.flags.Parse(args)
	var err error
	if c.history, err = newHistory(*path); err != nil {
		return err
	}
	if err := c.namePartitions(*counts); err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, c.timeout)
	defer cancel()
	var stopWriting, stopReading context.CancelFunc
	c.writing, stopWriting = context.WithCancel(ctx)
	c.reading, stopReading = context.WithCancel(ctx)
	defer stopReading()
	defer stopWriting()

	var writers, readers sync.WaitGroup
	start := func(group *sync.WaitGroup, run func(*rand.Rand)) {
		c.seed++
		random := rand.New(rand.NewSource(c.seed))
		group.Add(1)
		go func() {
			defer group.Done()
			run(random)
		}()
	}
	for n := range *producers {
		// The second of each mode is replaced now and then, with what it has in flight.
		churn := n%2 == 1
		for _, mode := range []string{"idempotent", "retry"} {
			start(&writers, func(random *rand.Rand) { c.produceAs(mode, churn, random) })
		}
		start(&writers, func(random *rand.Rand) { c.produceOnce(random) })
	}
	start(&readers, func(random *rand.Rand) { c.followLog("tail", random) })
	start(&readers, func(random *rand.Rand) { c.rereadLog(random) })
	for n := range *members {
		start(&readers, func(random *rand.Rand) { c.beMember(n > 0, random) })
	}
	start(&readers, func(*rand.Rand) { c.watchWatermarks() })
	start(&readers, func(*rand.Rand) { c.watchPositions() })
	go c.showProgress(ctx)

	commands := bufio.NewScanner(os.Stdin)
	for commands.Scan() {
		name, rest, _ := strings.Cut(commands.Text(), " ")
		began := time.Now()
		switch name {
		case "note":
			c.history.note("note", `"what":%s`, quoted(rest))
			continue
		case "warm":
			c.awaitAcks()
		case "healed":
			c.history.note("healed", "")
			c.awaitAcks()
		case "finish":
			c.history.note("finish", "")
			stopWriting()
			c.awaitAll(&writers, "the producers to end")
			c.awaitReaders()
			stopReading()
			c.awaitAll(&readers, "the readers to end")
		case "readback":
			c.readBack(ctx, rest)
		case "quit":
			return c.history.flush()
		default:
			return fmt.Errorf("unknown command %q", name)
		}
		if err := c.history.flush(); err != nil {
			return err
		}
		fmt.Printf("done %s %d\n", name, time.Since(began).Milliseconds())
	}
	return errors.Join(commands.Err(), c.history.flush())
}

func (c *checker) namePartitions(counts string) error {
	topics := strings.Split(c.topic, ",")
	numbers := strings.Split(counts, ",")
	if len(topics) != len(numbers) {
		return errors.New("-partitions needs a number for each topic")
	}
	for i, topic := range topics {
		var count int32
		if _, err := fmt.Sscan(numbers[i], &count); err != nil {
			return fmt.Errorf("-partitions: %w", err)
		}
		for p := range count {
			c.history.note("partition", `"p":%d,"topic":%s,"partition":%d`, len(c.partitions), quoted(topic), p)
			c.partitions = append(c.partitions, partitionName{topic, p})
		}
	}
	return nil
}

// number finds a partition of a client's answer. Topics and partitions come from our own list.
func (c *checker) number(topic string, partition int32) int {
	for n, name := range c.partitions {
		if name.topic == topic && name.partition == partition {
			return n
		}
	}
	panic(fmt.Sprintf("%s-%d was never asked for", topic, partition))
}

func (c *checker) topics() []string { return strings.Split(c.topic, ",") }

func (c *checker) showProgress(ctx context.Context) {
	for ctx.Err() == nil {
		fmt.Printf("progress {\"sent\":%d,\"acked\":%d,\"failed\":%d,\"unknown\":%d,\"polled\":%d,\"commits\":%d}\n",
			c.sent.Load(), c.acked.Load(), c.failed.Load(), c.unknown.Load(), c.polled.Load(), c.commits.Load())
		_ = c.history.flush()
		pause(ctx, time.Second)
	}
}

// pause lets time pass between operations, as clients do.
func pause(ctx context.Context, duration time.Duration) {
	select {
	case <-ctx.Done():
	case <-time.After(duration):
	}
}

// stuck notes who made no progress within the bound.
func (c *checker) stuck(who, format string, args ...any) {
	c.history.note("stuck", `"who":%s,"why":%s`, quoted(who), quoted(fmt.Sprintf(format, args...)))
}

// within looks until `left` is empty or the bound is over, and gives what is left.
func (c *checker) within(left func() []string) []string {
	var found []string
	until(time.Now().Add(c.bound), func() bool {
		found = left()
		return len(found) == 0
	})
	return found
}

// awaitAcks waits until every producer was acknowledged in every partition for a send that began
// after this.
func (c *checker) awaitAcks() {
	c.mu.Lock()
	for p := range c.producers {
		p.forgetAcks()
	}
	c.mu.Unlock()
	for _, why := range c.within(func() (left []string) {
		c.mu.Lock()
		defer c.mu.Unlock()
		for p := range c.producers {
			left = append(left, p.withoutAck()...)
		}
		return left
	}) {
		c.stuck("producer", "%s", why)
	}
}

func (c *checker) awaitAll(group *sync.WaitGroup, what string) {
	ended := make(chan struct{})
	go func() { group.Wait(); close(ended) }()
	select {
	case <-ended:
	case <-time.After(c.bound):
		c.stuck("workload", "waited %v for %s", c.bound, what)
	}
}

// awaitReaders waits until the followers of the log and the group have read up to its end.
func (c *checker) awaitReaders() {
	ctx, cancel := context.WithTimeout(c.reading, c.bound)
	defer cancel()
	ends, err := c.logEnds(ctx)
	if err != nil {
		c.stuck("readers", "no log end within %v: %v", c.bound, err)
		return
	}
	for _, why := range c.within(func() (left []string) {
		c.mu.Lock()
		defer c.mu.Unlock()
		for who, positions := range c.positions {
			for p, end := range ends {
				if positions[p] < end {
					left = append(left, fmt.Sprintf("%s is at %d of %d in partition %d", who, positions[p], end, p))
				}
			}
		}
		return left
	}) {
		c.stuck("reader", "%s", why)
	}
}

// advance remembers how far a follower has come.
func (c *checker) advance(who string, p int, next int64) {
	c.mu.Lock()
	defer c.mu.Unlock()
	positions := c.positions[who]
	if positions == nil {
		positions = make([]int64, len(c.partitions))
		c.positions[who] = positions
	}
	positions[p] = max(positions[p], next)
}

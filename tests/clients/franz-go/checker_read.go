// The consumers and observers of the consistency checker.
package main

import (
	"context"
	"errors"
	"fmt"
	"math/rand"
	"net"
	"sync"
	"time"

	"github.com/twmb/franz-go/pkg/kerr"
	"github.com/twmb/franz-go/pkg/kgo"
	"github.com/twmb/franz-go/pkg/kmsg"
)

const observeInterval = 250 * time.Millisecond

func (c *checker) newReader(kind string) int {
	reader := int(c.nextReader.Add(1))
	c.history.note("reader", `"r":%d,"kind":%s`, reader, quoted(kind))
	return reader
}

// readFrom gives a client that reads all partitions from these offsets on.
func (c *checker) readFrom(offsets []int64) (*kgo.Client, error) {
	partitions := map[string]map[int32]kgo.Offset{}
	for p, name := range c.partitions {
		if partitions[name.topic] == nil {
			partitions[name.topic] = map[int32]kgo.Offset{}
		}
		partitions[name.topic][name.partition] = kgo.NewOffset().At(offsets[p])
	}
	// An offset that is refused is told, not reset.
	return c.client(kgo.ConsumePartitions(partitions), kgo.ConsumeResetOffset(kgo.NoResetOffset()))
}

// notePoll notes what a poll gave: per partition the runs of consecutive offsets, and errors.
func (c *checker) notePoll(reader int, kind string, fetches kgo.Fetches, advanced func(p int, next int64)) {
	for _, e := range fetches.Errors() {
		if errors.Is(e.Err, context.Canceled) || errors.Is(e.Err, context.DeadlineExceeded) || errors.Is(e.Err, kgo.ErrClientClosed) {
			continue
		}
		c.history.note("error", `"r":%d,"why":%s`, reader, quoted(fmt.Sprintf("%v (%s-%d)", e.Err, e.Topic, e.Partition)))
	}
	fetches.EachPartition(func(fetched kgo.FetchTopicPartition) {
		if len(fetched.Records) == 0 {
			return
		}
		p := c.number(fetched.Topic, fetched.Partition)
		var current run
		end := func() {
			c.history.note(kind, `"r":%d,"p":%d,"o":%d,"v":[%s]`, reader, p, current.first, current.list())
			current = run{}
		}
		for _, record := range fetched.Records {
			value, err := parseValue(p, record.Value)
			if err != nil {
				c.history.note("corrupt", `"r":%d,"p":%d,"o":%d,"why":%s`, reader, p, record.Offset, quoted(err.Error()))
				value = "0,0"
			}
			if current.add(record.Offset, value) {
				end()
				current.add(record.Offset, value)
			}
		}
		end()
		c.polled.Add(int64(len(fetched.Records)))
		advanced(p, fetched.Records[len(fetched.Records)-1].Offset+1)
	})
}

// followLog reads everything from the start, once, as it comes.
func (c *checker) followLog(kind string, _ *rand.Rand) {
	reader := c.newReader(kind)
	client, err := c.readFrom(make([]int64, len(c.partitions)))
	if err != nil {
		c.stuck("reader", "no client: %v", err)
		return
	}
	defer client.Close()
	for p := range c.partitions {
		c.history.note("seek", `"r":%d,"p":%d,"o":0`, reader, p)
		c.advance(kind, p, 0)
	}
	for c.reading.Err() == nil {
		c.notePoll(reader, "poll", client.PollFetches(c.reading), func(p int, next int64) { c.advance(kind, p, next) })
	}
}

// rereadLog reads with one client after the other, each from somewhere below what is known.
func (c *checker) rereadLog(random *rand.Rand) {
	known := make([]int64, len(c.partitions))
	for c.reading.Err() == nil {
		from := make([]int64, len(known))
		for p := range from {
			from[p] = random.Int63n(known[p] + 1)
		}
		client, err := c.readFrom(from)
		if err != nil {
			c.stuck("reader", "no client: %v", err)
			return
		}
		reader := c.newReader("reread")
		for p, offset := range from {
			c.history.note("seek", `"r":%d,"p":%d,"o":%d`, reader, p, offset)
		}
		life, done := context.WithTimeout(c.reading, time.Second+time.Duration(random.Int63n(int64(clientLife))))
		for life.Err() == nil {
			c.notePoll(reader, "poll", client.PollFetches(life), func(p int, next int64) { known[p] = max(known[p], next) })
		}
		done()
		client.Close()
	}
}

// beMember reads in the group, with one client after the other if it is replaced now and then:
// some leave, some vanish.
func (c *checker) beMember(replaced bool, random *rand.Rand) {
	for c.reading.Err() == nil {
		life, done := c.reading, context.CancelFunc(func() {})
		if replaced {
			life, done = context.WithTimeout(c.reading, clientLife+time.Duration(random.Int63n(int64(2*clientLife))))
		}
		c.beOneMember(life, random.Intn(2) == 0)
		done()
	}
}

func (c *checker) beOneMember(life context.Context, vanishes bool) {
	reader := c.newReader("member")
	line := &cutLine{}
	noteAll := func(kind string) func(context.Context, *kgo.Client, map[string][]int32) {
		return func(_ context.Context, _ *kgo.Client, partitions map[string][]int32) {
			for topic, list := range partitions {
				for _, partition := range list {
					c.history.note(kind, `"r":%d,"p":%d`, reader, c.number(topic, partition))
				}
			}
		}
	}
	client, err := c.client(
		kgo.ConsumerGroup(c.group), kgo.ConsumeTopics(c.topics()...),
		kgo.Balancers(kgo.CooperativeStickyBalancer()),
		kgo.ConsumeStartOffset(kgo.NewOffset().AtStart()),
		kgo.ConsumeResetOffset(kgo.NoResetOffset()),
		kgo.DisableAutoCommit(), kgo.BlockRebalanceOnPoll(),
		kgo.SessionTimeout(6*time.Second), kgo.HeartbeatInterval(500*time.Millisecond), kgo.RebalanceTimeout(8*time.Second),
		kgo.OnPartitionsAssigned(noteAll("assign")), kgo.OnPartitionsRevoked(noteAll("revoke")), kgo.OnPartitionsLost(noteAll("revoke")),
		kgo.Dialer(line.dial),
	)
	if err != nil {
		c.stuck("member", "no client: %v", err)
		return
	}
	for life.Err() == nil {
		fetches := client.PollFetches(life)
		next := map[int]int64{}
		c.notePoll(reader, "poll", fetches, func(p int, offset int64) { next[p] = offset; c.advance("group", p, offset) })
		if len(next) > 0 {
			c.commit(client, reader, fetches.Records(), next)
		}
		client.AllowRebalance()
	}
	c.history.note("gone", `"r":%d`, reader)
	if vanishes {
		line.cut()
	}
	// Leaving may take as long as the coordinator is away, and nobody waits for it.
	go client.CloseAllowingRebalance()
}

func (c *checker) commit(client *kgo.Client, reader int, records []*kgo.Record, next map[int]int64) {
	key := c.history.key()
	for p, offset := range next {
		c.history.note("commit", `"k":%d,"r":%d,"p":%d,"o":%d`, key, reader, p, offset)
	}
	ctx, cancel := context.WithTimeout(c.reading, 10*time.Second)
	defer cancel()
	if err := client.CommitRecords(ctx, records...); err != nil {
		c.history.note("uncommitted", `"k":%d,"why":%s`, key, quoted(err.Error()))
		return
	}
	c.commits.Add(1)
	c.history.note("committed", `"k":%d`, key)
}

// cutLine dials until it is cut; then nothing gets out of the client any more.
type cutLine struct {
	mu    sync.Mutex
	dead  bool
	conns []net.Conn
}

func (l *cutLine) dial(ctx context.Context, network, address string) (net.Conn, error) {
	dialer := net.Dialer{Timeout: 2 * time.Second}
	conn, err := dialer.DialContext(ctx, network, address)
	if err != nil {
		return nil, err
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.dead {
		_ = conn.Close()
		return nil, errors.New("this client has vanished")
	}
	l.conns = append(l.conns, conn)
	return conn, nil
}

func (l *cutLine) cut() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.dead = true
	for _, conn := range l.conns {
		_ = conn.Close()
	}
}

// watchWatermarks asks each partition's leader for its log end, under the leader epoch that it is
// known by, again and again.
func (c *checker) watchWatermarks() {
	client, err := c.client()
	if err != nil {
		c.stuck("observer", "no client: %v", err)
		return
	}
	defer client.Close()
	for c.reading.Err() == nil {
		if routes, err := c.routes(c.reading, client); err == nil {
			for p, to := range routes {
				key := c.history.key()
				c.history.note("ask", `"k":%d`, key)
				if offset, err := c.logEnd(c.reading, client, to, c.partitions[p]); err == nil {
					c.history.note("watermark", `"k":%d,"p":%d,"epoch":%d,"o":%d`, key, p, to.leaderEpoch, offset)
				}
			}
		}
		pause(c.reading, observeInterval)
	}
}

func (c *checker) logEnd(ctx context.Context, client *kgo.Client, to route, name partitionName) (int64, error) {
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	request := kmsg.NewPtrListOffsetsRequest()
	request.ReplicaID = -1
	topic := kmsg.NewListOffsetsRequestTopic()
	topic.Topic = name.topic
	partition := kmsg.NewListOffsetsRequestTopicPartition()
	partition.Partition, partition.Timestamp, partition.CurrentLeaderEpoch = name.partition, -1, to.leaderEpoch
	topic.Partitions = append(topic.Partitions, partition)
	request.Topics = append(request.Topics, topic)
	answer, err := client.Broker(int(to.leader)).Request(ctx, request)
	if err != nil {
		return 0, err
	}
	response, ok := answer.(*kmsg.ListOffsetsResponse)
	if !ok || len(response.Topics) != 1 || len(response.Topics[0].Partitions) != 1 {
		return 0, errors.New("an answer about other partitions")
	}
	result := response.Topics[0].Partitions[0]
	return result.Offset, kerr.ErrorForCode(result.ErrorCode)
}

// logEnds asks until every partition has answered.
func (c *checker) logEnds(ctx context.Context) ([]int64, error) {
	client, err := c.client()
	if err != nil {
		return nil, err
	}
	defer client.Close()
	ends := make([]int64, len(c.partitions))
	asked := 0
	last := errors.New("not asked yet")
	for asked < len(ends) {
		if ctx.Err() != nil {
			return nil, fmt.Errorf("partition %d: %w", asked, last)
		}
		routes, err := c.routes(ctx, client)
		if err == nil {
			ends[asked], err = c.logEnd(ctx, client, routes[asked], c.partitions[asked])
		}
		if err != nil {
			last = err
			pause(ctx, 50*time.Millisecond)
			continue
		}
		asked++
	}
	return ends, nil
}

// watchPositions asks for the group's committed offsets, again and again.
func (c *checker) watchPositions() {
	client, err := c.client()
	if err != nil {
		c.stuck("observer", "no client: %v", err)
		return
	}
	defer client.Close()
	for c.reading.Err() == nil {
		key := c.history.key()
		c.history.note("ask", `"k":%d`, key)
		c.askPositions(client, key)
		pause(c.reading, 2*observeInterval)
	}
}

func (c *checker) askPositions(client *kgo.Client, key int) {
	ctx, cancel := context.WithTimeout(c.reading, 10*time.Second)
	defer cancel()
	request := kmsg.NewPtrOffsetFetchRequest()
	request.Group = c.group
	group := kmsg.NewOffsetFetchRequestGroup()
	group.Group = c.group
	request.Groups = append(request.Groups, group)
	response, err := request.RequestWith(ctx, client)
	if err != nil || len(response.Groups) > 1 {
		return
	}
	for _, found := range response.Groups {
		if found.ErrorCode != 0 {
			return
		}
		for _, topic := range found.Topics {
			for _, partition := range topic.Partitions {
				if partition.ErrorCode == 0 && partition.Offset >= 0 && topic.Topic != "" {
					c.history.note("position", `"k":%d,"p":%d,"o":%d`, key, c.number(topic.Topic, partition.Partition), partition.Offset)
				}
			}
		}
	}
}

// readBack reads everything up to the log ends with a new client.
func (c *checker) readBack(ctx context.Context, what string) {
	ctx, cancel := context.WithTimeout(ctx, c.bound)
	defer cancel()
	reader := c.newReader("readback")
	ends, err := c.logEnds(ctx)
	if err != nil {
		c.stuck("read back", "%s: no log ends within %v: %v", what, c.bound, err)
		return
	}
	c.history.note("readback", `"r":%d,"what":%s`, reader, quoted(what))
	client, err := c.readFrom(make([]int64, len(c.partitions)))
	if err != nil {
		c.stuck("read back", "%s: no client: %v", what, err)
		return
	}
	defer client.Close()
	for p, end := range ends {
		c.history.note("seek", `"r":%d,"p":%d,"o":0`, reader, p)
		c.history.note("end", `"r":%d,"p":%d,"o":%d`, reader, p, end)
	}
	next := make([]int64, len(ends))
	behind := func() (left []string) {
		for p := range ends {
			if next[p] < ends[p] {
				left = append(left, fmt.Sprintf("partition %d at %d of %d", p, next[p], ends[p]))
			}
		}
		return left
	}
	for len(behind()) > 0 && ctx.Err() == nil {
		c.notePoll(reader, "poll", client.PollFetches(ctx), func(p int, offset int64) { next[p] = offset })
	}
	if left := behind(); len(left) > 0 {
		c.stuck("read back", "%s: %v", what, left)
		return
	}
	c.history.note("complete", `"r":%d`, reader)
}

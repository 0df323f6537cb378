// A second codec for every API in every version: requests are encoded and responses decoded by kmsg,
// which is generated from Kafka's own descriptions and shares nothing with the gateway's codec.
//
// Invariant: what was called is counted where a response is checked, and compared with what ApiVersions
// advertises, so no version is left out without being told; a response has to decode, and to be the
// very bytes that kmsg makes of what it decoded, so none is left over.
package main

import (
	"bytes"
	"context"
	"encoding/binary"
	"fmt"
	"io"
	"net"
	"slices"
	"strings"
	"time"

	"github.com/twmb/franz-go/pkg/kmsg"
)

const (
	versionsClientID = "chronik-versions"
	findingsShown    = 25
)

// scenario calls the APIs `keys` once per version. It is run for every version from the lowest to the
// highest of them all; an API that does not have it is called in the nearest that it has.
type scenario struct {
	keys []kmsg.Key
	run  func(s *session, version int16)
}

var scenarios = []scenario{
	{[]kmsg.Key{kmsg.ApiVersions}, (*session).apiVersions},
	{[]kmsg.Key{kmsg.CreateTopics, kmsg.DeleteTopics}, (*session).createAndDelete},
	{[]kmsg.Key{kmsg.CreatePartitions}, (*session).createPartitions},
	{[]kmsg.Key{kmsg.IncrementalAlterConfigs, kmsg.DescribeConfigs}, (*session).configs},
	{[]kmsg.Key{kmsg.Metadata}, (*session).metadata},
	{[]kmsg.Key{kmsg.DescribeCluster}, (*session).describeCluster},
	{[]kmsg.Key{kmsg.InitProducerID}, (*session).initProducerID},
	{[]kmsg.Key{kmsg.Produce}, (*session).produceRecord},
	{[]kmsg.Key{kmsg.Fetch}, (*session).fetch},
	{[]kmsg.Key{kmsg.ListOffsets}, (*session).listOffsets},
	{[]kmsg.Key{kmsg.OffsetForLeaderEpoch}, (*session).offsetForLeaderEpoch},
	{[]kmsg.Key{kmsg.DeleteRecords}, (*session).deleteRecords},
	{[]kmsg.Key{kmsg.FindCoordinator}, (*session).findCoordinator},
	{[]kmsg.Key{kmsg.OffsetCommit, kmsg.OffsetFetch}, (*session).offsets},
	{[]kmsg.Key{kmsg.JoinGroup, kmsg.SyncGroup, kmsg.Heartbeat, kmsg.DescribeGroups, kmsg.ListGroups,
		kmsg.LeaveGroup}, (*session).groupLife},
	{[]kmsg.Key{kmsg.DescribeLogDirs}, (*session).describeLogDirs},
	{[]kmsg.Key{kmsg.ElectLeaders}, (*session).electLeaders},
	{[]kmsg.Key{kmsg.AlterPartitionAssignments, kmsg.ListPartitionReassignments}, (*session).reassignments},
	{[]kmsg.Key{kmsg.UnregisterBroker}, (*session).unregisterBroker},
}

// versionRange has both ends in it.
type versionRange struct{ low, high int16 }

// session is what the scenarios share: connections, what is advertised, what was called and found.
type session struct {
	bootstrap   string
	began       time.Time
	deadline    time.Time
	connections map[string]net.Conn
	correlation int32
	advertised  map[int16]versionRange
	called      map[int16]map[int16]bool
	findings    []string
	topicID     [16]byte
	written     int64
	producerID  int64
}

// versions calls every API that is advertised in every version, prints what it called, an API per
// line as "Metadata(3): 0 to 13" with kmsg's names, and fails if anything was wrong. The cluster has to be a new one of
// three brokers.
func versions(ctx context.Context, args []string) error {
	c := newCommon("versions")
	_ = c.flags.Parse(args)
	s := &session{
		bootstrap:   strings.Split(c.brokers, ",")[0],
		began:       time.Now(),
		deadline:    time.Now().Add(c.timeout),
		connections: map[string]net.Conn{},
		advertised:  map[int16]versionRange{},
		called:      map[int16]map[int16]bool{},
		producerID:  -1,
	}
	defer func() {
		for _, connection := range s.connections {
			_ = connection.Close()
		}
	}()
	s.learnAdvertised()
	s.createMainTopic()
	for _, scenario := range scenarios {
		low, high := s.span(scenario.keys)
		for version := low; version <= high; version++ {
			scenario.run(s, version)
		}
	}
	s.compareCalled()
	if len(s.findings) > 0 {
		first := s.findings[:min(len(s.findings), findingsShown)]
		return fmt.Errorf("%d findings:\n%s", len(s.findings), strings.Join(first, "\n"))
	}
	return nil
}

// span is from the lowest to the highest version of any of the APIs; empty if none is advertised.
func (s *session) span(keys []kmsg.Key) (low, high int16) {
	low, high = 0, -1
	for i, key := range keys {
		advertised, there := s.advertised[key.Int16()]
		if !there {
			s.wrong("%s is not advertised", key.Name())
			continue
		}
		if i == 0 || advertised.low < low {
			low = advertised.low
		}
		high = max(high, advertised.high)
	}
	return low, high
}

// fit is the advertised version of an API that is nearest to `version`.
func (s *session) fit(key kmsg.Key, version int16) int16 {
	advertised := s.advertised[key.Int16()]
	return min(max(version, advertised.low), advertised.high)
}

// latest is the highest advertised version, for what a scenario needs besides.
func (s *session) latest(key kmsg.Key) int16 { return s.advertised[key.Int16()].high }

func (s *session) wrong(format string, args ...any) {
	s.findings = append(s.findings, fmt.Sprintf(format, args...))
}

// expect notes a finding of a response, unless `found` is `expected`.
func expect[T comparable](s *session, response kmsg.Response, what string, found, expected T) {
	if found != expected {
		s.wrong("%s: %s is %v, expected %v", nameOf(response), what, found, expected)
	}
}

func nameOf(response kmsg.Response) string {
	return fmt.Sprintf("%s v%d", kmsg.NameForKey(response.Key()), response.GetVersion())
}

// at asks one endpoint, in the advertised version that is nearest to `version`. After a finding that
// leaves no response it gives an empty one.
func at[R kmsg.Response](s *session, address string, request kmsg.Request, version int16) R {
	request.SetVersion(s.fit(kmsg.Key(request.Key()), version))
	response := request.ResponseKind()
	name := nameOf(response)
	if request.GetVersion() > request.MaxVersion() {
		s.wrong("%s: kmsg ends at version %d", name, request.MaxVersion())
		return response.(R)
	}
	if s.called[request.Key()] == nil {
		s.called[request.Key()] = map[int16]bool{}
	}
	s.called[request.Key()][request.GetVersion()] = true
	body, err := s.exchange(address, request)
	if err != nil {
		s.wrong("%s: %v", name, err)
		// What the other side still sends belongs to no later request.
		if connection := s.connections[address]; connection != nil {
			_ = connection.Close()
			delete(s.connections, address)
		}
		return response.(R)
	}
	if err := response.ReadFrom(body); err != nil {
		s.wrong("%s: does not decode: %v\n  %x", name, err, body)
	} else if again := response.AppendTo(nil); !bytes.Equal(again, body) {
		s.wrong("%s: %d bytes came, %d were understood\n  %x\n  %x", name, len(body), len(again), body, again)
	}
	return response.(R)
}

// ask is the same at the endpoint that the session was given.
func ask[R kmsg.Response](s *session, request kmsg.Request, version int16) R {
	return at[R](s, s.bootstrap, request, version)
}

// exchange sends a request as it is, in its own version, and gives the response without its header.
func (s *session) exchange(address string, request kmsg.Request) ([]byte, error) {
	connection := s.connections[address]
	if connection == nil {
		dialled, err := net.DialTimeout("tcp", address, 10*time.Second)
		if err != nil {
			return nil, err
		}
		connection = dialled
		_ = connection.SetDeadline(s.deadline)
		s.connections[address] = connection
	}
	s.correlation++
	formatter := kmsg.NewRequestFormatter(kmsg.FormatterClientID(versionsClientID))
	if _, err := connection.Write(formatter.AppendRequest(nil, request, s.correlation)); err != nil {
		return nil, err
	}
	var length [4]byte
	if _, err := io.ReadFull(connection, length[:]); err != nil {
		return nil, fmt.Errorf("no answer: %w", err)
	}
	size := binary.BigEndian.Uint32(length[:])
	if size > 16<<20 {
		return nil, fmt.Errorf("an answer of %d bytes", size)
	}
	frame := make([]byte, size)
	if _, err := io.ReadFull(connection, frame); err != nil {
		return nil, fmt.Errorf("half an answer: %w", err)
	}
	header := 4
	// The header of an ApiVersions response is the old one in every version.
	if request.IsFlexible() && request.Key() != kmsg.ApiVersions.Int16() {
		header = 5
	}
	if len(frame) < header || binary.BigEndian.Uint32(frame) != uint32(s.correlation) {
		return nil, fmt.Errorf("not an answer to request %d: %x", s.correlation, frame)
	}
	if header == 5 && frame[4] != 0 {
		return nil, fmt.Errorf("tags in the header: %x", frame)
	}
	return frame[header:], nil
}

func (s *session) learnAdvertised() {
	// The one version that everybody can ask for.
	s.advertised[kmsg.ApiVersions.Int16()] = versionRange{0, 0}
	response := ask[*kmsg.ApiVersionsResponse](s, kmsg.NewPtrApiVersionsRequest(), 0)
	expect(s, response, "error code", response.ErrorCode, 0)
	for _, api := range response.ApiKeys {
		s.advertised[api.ApiKey] = versionRange{api.MinVersion, api.MaxVersion}
	}
}

// compareCalled holds what was called against what is advertised, and prints it.
func (s *session) compareCalled() {
	var keys []int16
	for key := range s.advertised {
		keys = append(keys, key)
	}
	slices.Sort(keys)
	for _, key := range keys {
		advertised, called := s.advertised[key], s.called[key]
		name := fmt.Sprintf("%s(%d)", kmsg.NameForKey(key), key)
		complete := advertised.low <= advertised.high
		for version := advertised.low; version <= advertised.high; version++ {
			complete = complete && called[version]
		}
		switch {
		case !complete || len(called) != int(advertised.high-advertised.low)+1:
			s.wrong("%s: advertised are %d to %d, called was %v", name, advertised.low, advertised.high, called)
		case advertised.low == advertised.high:
			fmt.Printf("%s: %d\n", name, advertised.low)
		default:
			fmt.Printf("%s: %d to %d\n", name, advertised.low, advertised.high)
		}
	}
}

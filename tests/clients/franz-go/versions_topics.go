// The scenarios of `versions` about topics and the nodes of the cluster.
//
// Invariant: what an administrator's request says it did is looked up by another request.
package main

import (
	"fmt"
	"slices"
	"time"

	"github.com/twmb/franz-go/pkg/kmsg"
)

const (
	mainTopic  = "versions"
	grownTopic = "versions-grown"
	partitions = 3
	replicas   = 3

	unknownTopic           int16 = 3
	electionNotNeeded      int16 = 84
	noReassignment         int16 = 85
	unknownTopicID         int16 = 100
	brokerIDNotRegistered  int16 = 102
	noOperations           int32 = -1 << 31
	retentionMS                  = "retention.ms"
	adminTimeoutMS               = 30_000
	topicConfig, topicKind int8  = 1, 2
)

func (s *session) apiVersions(version int16) {
	request := kmsg.NewPtrApiVersionsRequest()
	request.ClientSoftwareName, request.ClientSoftwareVersion = versionsClientID, "1"
	response := ask[*kmsg.ApiVersionsResponse](s, request, version)
	expect(s, response, "error code", response.ErrorCode, 0)
	expect(s, response, "number of APIs", len(response.ApiKeys), len(s.advertised))
	for _, api := range response.ApiKeys {
		what := "range of " + kmsg.NameForKey(api.ApiKey)
		expect(s, response, what, versionRange{api.MinVersion, api.MaxVersion}, s.advertised[api.ApiKey])
	}
}

func (s *session) createTopic(name string, partitions int32, version int16) *kmsg.CreateTopicsResponse {
	request := kmsg.NewPtrCreateTopicsRequest()
	request.TimeoutMillis = adminTimeoutMS
	topic := kmsg.NewCreateTopicsRequestTopic()
	topic.Topic, topic.NumPartitions, topic.ReplicationFactor = name, partitions, replicas
	config := kmsg.NewCreateTopicsRequestTopicConfig()
	config.Name, config.Value = retentionMS, kmsg.StringPtr("3600000")
	topic.Configs = append(topic.Configs, config)
	request.Topics = append(request.Topics, topic)
	response := ask[*kmsg.CreateTopicsResponse](s, request, version)
	expect(s, response, "number of topics", len(response.Topics), 1)
	for _, topic := range response.Topics {
		expect(s, response, "topic", topic.Topic, name)
		expect(s, response, "error code", topic.ErrorCode, 0)
		expect(s, response, "error message", text(topic.ErrorMessage), "")
	}
	return response
}

func (s *session) createMainTopic() {
	s.createTopic(mainTopic, partitions, s.latest(kmsg.CreateTopics))
	s.createTopic(grownTopic, 1, s.latest(kmsg.CreateTopics))
	_, topic := s.describedTopic(mainTopic)
	s.topicID = topic.TopicID
}

// describedTopic is what the latest Metadata says of a topic, which it does not create.
func (s *session) describedTopic(name string) (*kmsg.MetadataResponse, kmsg.MetadataResponseTopic) {
	return s.askMetadata(name, [16]byte{}, s.latest(kmsg.Metadata))
}

// askMetadata asks for one topic: by its id if it has no name.
func (s *session) askMetadata(name string, id [16]byte, version int16) (*kmsg.MetadataResponse, kmsg.MetadataResponseTopic) {
	request := kmsg.NewPtrMetadataRequest()
	topic := kmsg.NewMetadataRequestTopic()
	topic.TopicID = id
	if name != "" {
		topic.Topic = kmsg.StringPtr(name)
	}
	request.Topics = append(request.Topics, topic)
	request.IncludeTopicAuthorizedOperations = true
	response := ask[*kmsg.MetadataResponse](s, request, version)
	expect(s, response, "number of topics", len(response.Topics), 1)
	if len(response.Topics) == 0 {
		return response, kmsg.NewMetadataResponseTopic()
	}
	return response, response.Topics[0]
}

func (s *session) metadata(version int16) {
	// Leaders and in-sync replicas may change meanwhile: then it is looked at again.
	for still := false; !still; {
		findings := len(s.findings)
		_, before := s.describedTopic(mainTopic)
		s.describeMainTopic(version, before)
		_, after := s.describedTopic(mainTopic)
		still = fmt.Sprint(before.Partitions) == fmt.Sprint(after.Partitions) || time.Now().After(s.deadline)
		if !still {
			s.findings = s.findings[:findings]
		}
	}
	// All topics: no list, and in version 0 an empty one.
	request := kmsg.NewPtrMetadataRequest()
	if version == 0 {
		request.Topics = []kmsg.MetadataRequestTopic{}
	}
	all := ask[*kmsg.MetadataResponse](s, request, version)
	has := func(topic kmsg.MetadataResponseTopic) bool {
		return topic.Topic != nil && *topic.Topic == mainTopic
	}
	expect(s, all, "all topics have the one", slices.ContainsFunc(all.Topics, has), true)
}

func (s *session) describeMainTopic(version int16, latest kmsg.MetadataResponseTopic) {
	response, topic := s.askMetadata(mainTopic, [16]byte{}, version)
	expect(s, response, "error code of all", response.ErrorCode, 0)
	s.checkNodes(response, response.Brokers)
	if version >= 1 {
		expect(s, response, "controller is a broker", slices.Contains([]int32{1, 2, 3}, response.ControllerID), true)
	}
	if version >= 2 {
		expect(s, response, "has a cluster id", text(response.ClusterID) != "", true)
	}
	s.checkTopic(response, topic, latest)
	if version >= 10 {
		response, topic := s.askMetadata("", s.topicID, version)
		s.checkTopic(response, topic, latest)
	}
}

func (s *session) checkTopic(response *kmsg.MetadataResponse, topic, latest kmsg.MetadataResponseTopic) {
	version := response.Version
	expect(s, response, "error code", topic.ErrorCode, 0)
	expect(s, response, "topic", text(topic.Topic), mainTopic)
	expect(s, response, "is internal", topic.IsInternal, false)
	expect(s, response, "number of partitions", len(topic.Partitions), partitions)
	if version >= 8 {
		expect(s, response, "tells operations", topic.AuthorizedOperations != noOperations, true)
	}
	if version >= 10 {
		expect(s, response, "topic id", topic.TopicID, s.topicID)
	}
	for i, partition := range topic.Partitions[:min(len(topic.Partitions), len(latest.Partitions))] {
		expected := latest.Partitions[i]
		if version < 7 {
			expected.LeaderEpoch = -1
		}
		expect(s, response, "partition", fmt.Sprint(partition), fmt.Sprint(expected))
		expect(s, response, "number of replicas", len(partition.Replicas), replicas)
		expect(s, response, "leader is a replica", slices.Contains(partition.Replicas, partition.Leader), true)
	}
}

// checkNodes: the brokers 1 to 3, each at an address of its own.
func (s *session) checkNodes(response kmsg.Response, brokers []kmsg.MetadataResponseBroker) {
	var ids []int32
	addresses := map[string]bool{}
	for _, broker := range brokers {
		ids = append(ids, broker.NodeID)
		addresses[fmt.Sprintf("%s:%d", broker.Host, broker.Port)] = true
	}
	slices.Sort(ids)
	expect(s, response, "brokers", fmt.Sprint(ids), "[1 2 3]")
	expect(s, response, "number of addresses", len(addresses), 3)
	expect(s, response, "the address asked is one of them", addresses[s.bootstrap], true)
}

func describedNodes(brokers []kmsg.MetadataResponseBroker) (all string) {
	for _, broker := range brokers {
		all += fmt.Sprintf("%d at %s:%d in %q; ", broker.NodeID, broker.Host, broker.Port, text(broker.Rack))
	}
	return all
}

func (s *session) describeCluster(version int16) {
	request := kmsg.NewPtrDescribeClusterRequest()
	request.IncludeClusterAuthorizedOperations = true
	response := ask[*kmsg.DescribeClusterResponse](s, request, version)
	metadata, _ := s.describedTopic(mainTopic)
	expect(s, response, "error code", response.ErrorCode, 0)
	expect(s, response, "cluster id", response.ClusterID, text(metadata.ClusterID))
	expect(s, response, "endpoint type", response.EndpointType, 1)
	expect(s, response, "tells operations", response.ClusterAuthorizedOperations != noOperations, true)
	var nodes []kmsg.MetadataResponseBroker
	for _, b := range response.Brokers {
		expect(s, response, "is fenced", b.IsFenced, false)
		nodes = append(nodes, kmsg.MetadataResponseBroker{NodeID: b.NodeID, Host: b.Host, Port: b.Port, Rack: b.Rack})
	}
	s.checkNodes(response, nodes)
	expect(s, response, "nodes", describedNodes(nodes), describedNodes(metadata.Brokers))
}

func (s *session) createAndDelete(version int16) {
	name := fmt.Sprintf("versions-%d", version)
	created := s.createTopic(name, 2, version)
	_, topic := s.describedTopic(name)
	expect(s, created, "number of partitions in Metadata", len(topic.Partitions), 2)
	for _, told := range created.Topics {
		if created.Version >= 5 {
			expect(s, created, "number of partitions", told.NumPartitions, 2)
			expect(s, created, "replication factor", told.ReplicationFactor, replicas)
			is := func(c kmsg.CreateTopicsResponseTopicConfig) bool {
				return c.Name == retentionMS && text(c.Value) == "3600000" && c.Source == topicConfig
			}
			expect(s, created, "tells the config", slices.ContainsFunc(told.Configs, is), true)
		}
		if created.Version >= 7 {
			expect(s, created, "topic id", told.TopicID, topic.TopicID)
		}
	}
	request := kmsg.NewPtrDeleteTopicsRequest()
	request.TimeoutMillis = adminTimeoutMS
	request.TopicNames = []string{name}
	unknown := kmsg.NewDeleteTopicsRequestTopic()
	unknown.TopicID = [16]byte{1, 2, 3}
	known := kmsg.NewDeleteTopicsRequestTopic()
	known.TopicID = topic.TopicID
	request.Topics = append(request.Topics, known, unknown)
	deleted := ask[*kmsg.DeleteTopicsResponse](s, request, version)
	if deleted.Version >= 6 {
		expect(s, deleted, "number of topics", len(deleted.Topics), 2)
		for _, told := range deleted.Topics[min(len(deleted.Topics), 1):] {
			expect(s, deleted, "error code of an unknown id", told.ErrorCode, unknownTopicID)
			expect(s, deleted, "unknown id", told.TopicID, unknown.TopicID)
		}
	}
	for _, told := range deleted.Topics[:min(len(deleted.Topics), 1)] {
		expect(s, deleted, "error code", told.ErrorCode, 0)
		expect(s, deleted, "topic", text(told.Topic), name)
		if deleted.Version >= 6 {
			expect(s, deleted, "topic id", told.TopicID, topic.TopicID)
		}
	}
	_, gone := s.describedTopic(name)
	expect(s, deleted, "error code of Metadata afterwards", gone.ErrorCode, unknownTopic)
}

func (s *session) createPartitions(version int16) {
	_, before := s.describedTopic(grownTopic)
	request := kmsg.NewPtrCreatePartitionsRequest()
	request.TimeoutMillis = adminTimeoutMS
	topic := kmsg.NewCreatePartitionsRequestTopic()
	topic.Topic, topic.Count = grownTopic, int32(len(before.Partitions)+1)
	request.Topics = append(request.Topics, topic)
	response := ask[*kmsg.CreatePartitionsResponse](s, request, version)
	expect(s, response, "number of topics", len(response.Topics), 1)
	for _, told := range response.Topics {
		expect(s, response, "topic", told.Topic, grownTopic)
		expect(s, response, "error code", told.ErrorCode, 0)
	}
	_, after := s.describedTopic(grownTopic)
	expect(s, response, "number of partitions afterwards", len(after.Partitions), len(before.Partitions)+1)
}

func text(value *string) string {
	if value == nil {
		return ""
	}
	return *value
}
